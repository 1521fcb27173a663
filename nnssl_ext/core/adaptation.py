"""The adaptation plan that a checkpoint carries: how a downstream framework finds encoder, stem and positions.

Field names follow nnssl, so that nnU-Net's own loader of adapted checkpoints accepts ours; plain types only, because
it loads with ``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class EncoderKeys:
    """Where a network keeps its encoder, by key prefixes of its state dict.

    Args:
        encoder: prefix of the encoder.
        stem: prefix of the stem.
        in_proj: modules (all aliases) whose weight has the input channels as second axis.
        positions: key of the learned position embedding, or None.
    """

    encoder: str
    stem: str
    in_proj: tuple[str, ...]
    positions: str | None = None


def decoder_modules(names: Iterable[str]) -> tuple[str, ...]:
    """Modules of a decoder that a pretraining hands over: all but segmentation layers, and the encoder that a U-Net's decoder holds once more.

    Args:
        names: of the tensors in a network's state dict.
    """
    found = {".".join(name.split(".")[:2]) for name in names if name.startswith("decoder.")}
    return tuple(sorted(found - {"decoder.encoder", "decoder.seg_layers"}))


@dataclass(frozen=True)
class AdaptationPlan:
    """Everything a downstream framework needs to rebuild and feed the pretrained encoder.

    Args:
        arch_class_name: class name, such as "ResidualEncoderUNet" or "PrimusS".
        arch_kwargs: keyword arguments, classes as dotted names; None for presets.
        arch_imports: the keys of `arch_kwargs` that hold dotted names.
        configuration: name of the pretraining configuration.
        spacing: mm, (z, y, x), or None; None for an axis that keeps each case's own.
        patch_size: voxels of the pretraining patch, (z, y, x).
        channels: input channels of the pretraining.
        keys: where the encoder lies in ``network_weights``.
    """

    arch_class_name: str
    arch_kwargs: dict[str, Any] | None
    arch_imports: tuple[str, ...] | None
    configuration: str
    spacing: tuple[float | None, ...] | None
    patch_size: tuple[int, ...]
    channels: int
    keys: EncoderKeys

    def as_dict(self) -> dict[str, Any]:
        """Plain types, in nnssl's field names."""
        return {
            "schema_version": SCHEMA_VERSION,
            "architecture_plans": {
                "arch_class_name": self.arch_class_name,
                "arch_kwargs": self.arch_kwargs,
                "arch_kwargs_requiring_import": None if self.arch_imports is None else list(self.arch_imports),
            },
            "pretrain_plan": {
                "configurations": {
                    self.configuration: {
                        "spacing": None if self.spacing is None else [None if s is None else float(s) for s in self.spacing],
                        "patch_size": [int(p) for p in self.patch_size],
                    }
                }
            },
            "pretrain_num_input_channels": int(self.channels),
            "recommended_downstream_patchsize": [int(p) for p in self.patch_size],
            "key_to_encoder": self.keys.encoder,
            "key_to_stem": self.keys.stem,
            "keys_to_in_proj": list(self.keys.in_proj),
            "key_to_lpe": self.keys.positions,
        }
