"""Parameter groups whose learning rates fall layer by layer from the heads down to the stem."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

LAST_LAYER = "last_layer"  # name of the groups of prototypes
SHALLOW = 12  # blocks


def layer_decay(depth: int) -> float:
    """Factor from a block to the one below it: .9 up to 12 blocks, .95 for more (.9 to the power of 25 would all but freeze the stem)."""
    return 0.9 if depth <= SHALLOW else 0.95


def layer_groups(
    student: nn.Module,
    layers: Sequence[tuple[nn.Parameter, int]],
    tokenizer: nn.Module,
    weight_decay: float,
    *,
    last_layers: Collection[nn.Parameter] = (),
    decay: float | None = None,
    embed_scale: float = 0.2,
) -> list[dict]:
    """Every trainable parameter of a student in exactly one group for the optimiser; what would be groups of equal settings is one.

    A parameter in `layers` learns at decay^(L - layer) of the base rate, where L, the highest layer, is the final norm; all others
    (summary, heads) learn at the base rate. Vectors (biases, norms, scales), positions and other embeddings get no weight decay.

    Args:
        student: its parts are clipped by themselves: what is in `layers` ("backbone"), and each further child under its own name.
        layers: parameters with their layer, as `PrimusBackbone.layer_ids` gives them: blocks from 1, the final norm above them;
            layer 0 is the tokenizer's and that of embeddings (positions, registers, mask token).
        tokenizer: the module that embeds patches.
        weight_decay: times a group's "wd_scale" (1 or 0).
        last_layers: prototypes; their groups have the name "last_layer", so that `set_rates` can freeze them.
        decay: None = `layer_decay` of the number of blocks.
        embed_scale: further factor of the tokenizer.

    Returns:
        Groups with "params", "name", "part", "lr_scale", "wd_scale" and "weight_decay".

    Source: Clark et al. 2020, arXiv:2003.10555 (layer-wise rates); Oquab et al. 2023, arXiv:2304.07193 (patch embedding x .2).
    """
    layer_of = {id(parameter): layer for parameter, layer in layers}
    embedding, prototypes = ({id(parameter) for parameter in found} for found in (tokenizer.parameters(), last_layers))
    top = max(layer_of.values())
    decay = layer_decay(top - 1) if decay is None else decay
    groups: dict[tuple[str, bool, float, float], dict] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        key, layer = id(parameter), layer_of.get(id(parameter), top)
        part = "backbone" if key in layer_of else name.partition(".")[0]
        lr_scale = decay ** (top - layer) * (embed_scale if key in embedding else 1.0)
        wd_scale = 0.0 if parameter.ndim < 2 or (layer == 0 and key not in embedding) else 1.0
        title = LAST_LAYER if key in prototypes else f"{part}, lr x {lr_scale:.3g}, weight decay x {wd_scale:g}"
        settings = {"name": title, "part": part, "lr_scale": lr_scale, "wd_scale": wd_scale, "weight_decay": weight_decay * wd_scale}
        groups.setdefault((part, key in prototypes, lr_scale, wd_scale), {"params": [], **settings})["params"].append(parameter)
    return list(groups.values())
