"""Parameter groups for fine-tuning a transformer with learning rates that fall layer by layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from nnssl_ext.core.errors import UserError
from nnssl_ext.trainers.layer_decay import layer_groups


def finetuning_groups(network: Any, weight_decay: float, decay: float) -> list[dict[str, Any]]:
    """Groups of `layer_groups` for a Primus or a SegFormer3D with any decoder, which learns at the full rate.

    Args:
        network: that a plan of ours names.
        weight_decay: of matrices and kernels.
        decay: factor of the learning rate from a block to the one below it.

    Raises:
        UserError: a network of another kind.
    """
    if hasattr(network, "eva"):
        return layer_groups(network, _primus(network), network.down_projection, weight_decay, decay=decay, embed_scale=1.0)
    if hasattr(network, "encoder") and hasattr(network.encoder.stem, "projection"):
        return layer_groups(network, _segformer(network.encoder), network.encoder.stem, weight_decay, decay=decay, embed_scale=1.0)
    raise UserError("layer-wise learning rates are for transformers (Primus, SegFormer3D)", "option -tr", "use nnsslResEncTrainer for a U-Net")


def _primus(network: Any) -> list[tuple[nn.Parameter, int]]:
    """0 tokenizer, positions and registers, i + 1 block i, and the final norm above all blocks."""
    eva = network.eva
    above = {parameter: layer for layer, module in enumerate((*eva.blocks, eva.norm), 1) for parameter in module.parameters()}
    registers = [] if network.register_tokens is None else [network.register_tokens]
    return [(parameter, above.get(parameter, 0)) for parameter in (*network.down_projection.parameters(), *eva.parameters(), *registers)]


def _segformer(encoder: Any) -> list[tuple[nn.Parameter, int]]:
    """0 stem, i + 1 block i of all stages; a stage's embedding with its first block, its norm with its last one, the final norm above all blocks."""
    layers = [(parameter, 0) for parameter in encoder.stem.parameters()]
    blocks = 0
    for stage in encoder.stages:
        parts = [(stage.embedding, blocks + 1), *((block, blocks + i) for i, block in enumerate(stage.blocks, 1))]
        blocks += len(stage.blocks)
        parts.append((stage.norm, blocks + (stage is encoder.stages[-1])))
        layers += [(parameter, layer) for part, layer in parts for parameter in part.parameters()]
    return layers
