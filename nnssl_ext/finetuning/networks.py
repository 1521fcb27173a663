"""Networks that nnU-Net plans can name in ``architecture.network_class_name``, so that stock trainers build them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamic_network_architectures.architectures.primus import Primus, PrimusV2
from torch import Tensor, nn

# nnU-Net derives the scales of deep supervision from arch_kwargs["strides"] (all levels but the last) and gives the
# last scale the weight 0, so that ONE scale makes its loss 0/0. Three unit strides are two scales of full resolution.
FULL_RESOLUTION_STRIDES = ((1, 1, 1), (1, 1, 1), (1, 1, 1))


class _Planned(nn.Module):
    """A Primus as an nnU-Net plan describes it; its state dict has the library's names.

    The input is always `input_shape` large: nnU-Net's sliding window feeds exactly the plan's patch size.

    Args:
        input_channels: image channels.
        num_classes: segmentation heads.
        strides: for nnU-Net only (see `FULL_RESOLUTION_STRIDES`); the network has no strided levels.
        deep_supervision: whether the output is a list with one entry per scale, as nnU-Net's loss expects in training.
        primus: all other arguments of the library's class, among them `input_shape` (voxels) and `patch_embed_size`.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        strides: Sequence[Sequence[int]] = FULL_RESOLUTION_STRIDES,
        deep_supervision: bool = False,
        **primus: Any,
    ) -> None:
        super().__init__(input_channels=input_channels, num_classes=num_classes, **primus)
        self.scales = len(strides) - 1
        self.decoder = DeepSupervisionSwitch(deep_supervision)

    def forward(self, x: Tensor, ret_mask: bool = False) -> Any:
        """Logits (B, num_classes, z, y, x); with deep supervision the same logits once per scale."""
        logits = super().forward(x, ret_mask)
        return [logits] * self.scales if self.decoder.deep_supervision else logits


class PlannedPrimus(_Planned, Primus):
    """Primus for nnU-Net plans."""


class PlannedPrimusV2(_Planned, PrimusV2):
    """Primus V2 for nnU-Net plans."""


PLANNED = {library.__name__: planned for library, planned in ((Primus, PlannedPrimus), (PrimusV2, PlannedPrimusV2))}


class DeepSupervisionSwitch(nn.Module):
    """What nnU-Net sets as ``network.decoder.deep_supervision``; it holds no weights."""

    def __init__(self, deep_supervision: bool) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
