"""The 2D residual-encoder U-Net of dynamic-network-architectures as a backbone of volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn.backbones.resenc import ResEncBackbone


class ResEncSlicesBackbone(ResEncBackbone):
    """Reads a volume slice by slice: every slice is encoded and normalised by itself, and maps have as many slices as the input.

    To a method it is a backbone of volumes that never looks across slices; its state dict is that of the 2D network.

    Attributes:
        slice_axis: the axis across which slices lie, along which a patch has one voxel.
    """

    supports = frozenset({"pyramid", "decoder"})
    axes = 2

    def __init__(self, channels: int, patch_size: Sequence[int], class_name: str, kwargs: dict[str, Any], imports: Sequence[str]) -> None:
        if list(patch_size).count(1) != 1:
            raise UserError(f"a patch of {'x'.join(map(str, patch_size))} voxels is no slice", "patch_size of the plan", "let one axis have one voxel")
        self.slice_axis = list(patch_size).index(1)
        super().__init__(channels, patch_size, class_name, kwargs, imports)

    def pyramid(self, x: Tensor, active: Sequence[Tensor] | None = None) -> list[Tensor]:
        return [self._stacked(level, len(x)) for level in super().pyramid(self._slices(x), active)]

    def decode(self, maps: list[Tensor]) -> Tensor:
        return self._stacked(super().decode([self._slices(level) for level in maps]), len(maps[0]))

    def _total_strides(self) -> tuple[tuple[int, ...], ...]:
        return tuple((*level[: self.slice_axis], 1, *level[self.slice_axis :]) for level in super()._total_strides())

    def _slices(self, x: Tensor) -> Tensor:
        """All slices (B * n, C, ...) of volumes (B, C, z, y, x)."""
        return x.movedim(self.slice_axis + 2, 1).flatten(0, 1)

    def _stacked(self, x: Tensor, count: int) -> Tensor:
        """The slices of `count` volumes as these volumes again."""
        return x.unflatten(0, (count, -1)).movedim(1, self.slice_axis + 2)
