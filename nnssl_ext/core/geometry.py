"""Where a volume lies in the world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Box = tuple[tuple[int, int], ...]  # half-open voxel interval of each axis, in array order (z, y, x)


def box_slices(box: Box) -> tuple[slice, ...]:
    """Index of a box in an array (C, z, y, x): all channels, then one slice per axis."""
    return (slice(None), *(slice(low, high) for low, high in box))


@dataclass(frozen=True)
class Geometry:
    """Geometry of an array in axis order (z, y, x); the world is SimpleITK's (x, y, z) in mm (LPS).

    Args:
        shape: voxels, (z, y, x).
        spacing: mm, (z, y, x).
        origin: world position of the first voxel's centre, mm, (x, y, z).
        direction: 9 direction cosines as SimpleITK gives them (row-major; columns are the x, y, z axes).
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)

    def to_world(self, voxel_zyx: Sequence[float]) -> np.ndarray:
        """World position (x, y, z) in mm of a (fractional) voxel index (z, y, x)."""
        offset = np.asarray(voxel_zyx, float)[::-1] * np.asarray(self.spacing, float)[::-1]
        return np.asarray(self.origin, float) + np.asarray(self.direction, float).reshape(3, 3) @ offset

    def cropped(self, box: Box) -> Geometry:
        """The geometry of ``array[box]``."""
        start = [low for low, _ in box]
        return Geometry(tuple(high - low for low, high in box), self.spacing, tuple(float(v) for v in self.to_world(start)), self.direction)

    def resampled(self, shape: Sequence[int]) -> Geometry:
        """The geometry after resizing to `shape` with outer voxel faces kept in place."""
        spacing = tuple(float(s * old / new) for s, old, new in zip(self.spacing, self.shape, shape))
        first = [0.5 * old / new - 0.5 for old, new in zip(self.shape, shape)]
        return Geometry(tuple(int(n) for n in shape), spacing, tuple(float(v) for v in self.to_world(first)), self.direction)

    def as_dict(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "spacing": list(self.spacing), "origin": list(self.origin), "direction": list(self.direction)}

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Geometry:
        return Geometry(*(tuple(content[key]) for key in ("shape", "spacing", "origin", "direction")))


def resampled_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    """Voxels of each axis after resampling from `spacing` to `target` (nnU-Net's rule: rounded, at least 1)."""
    return tuple(max(1, int(round(old / new * n))) for n, old, new in zip(shape, spacing, target))
