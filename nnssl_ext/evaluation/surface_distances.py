"""Distances between the surfaces of two masks.

A surface is the mask's voxels that share a face with a voxel outside of it (or with the volume's edge); distances are those of voxel centres, in mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

_ROUNDING = 1e-9  # of a tolerance: a distance of just the tolerance lies within it


@dataclass(frozen=True)
class SurfaceDistances:
    """From every surface voxel of either mask to the nearest one of the other; both empty where one of the masks is.

    Args:
        forth: mm, of the first mask's voxels, (n,).
        back: mm, of the second mask's voxels, (m,).
    """

    forth: np.ndarray
    back: np.ndarray

    @staticmethod
    def between(first: np.ndarray, second: np.ndarray, spacing: Sequence[float]) -> SurfaceDistances:
        """Of two bool masks (z, y, x) on one grid with `spacing` in mm."""
        if not (first.any() and second.any()):
            return SurfaceDistances(np.zeros(0), np.zeros(0))
        box = ndimage.find_objects((first | second).astype(np.uint8))[0]  # nothing beyond can be nearer
        surfaces = [_surface(mask[box]) for mask in (first, second)]
        away = [ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces]
        return SurfaceDistances(away[1][surfaces[0]], away[0][surfaces[1]])

    def hd95(self) -> float:
        """The larger of the two 95th percentiles, mm (as in MONAI and the Metrics Reloaded; some pool both directions instead); NaN without surfaces."""
        return float(max(np.percentile(self.forth, 95), np.percentile(self.back, 95))) if len(self.forth) else float("nan")

    def assd(self) -> float:
        """Mean over all surface voxels of both masks, mm; NaN without surfaces."""
        return float((self.forth.sum() + self.back.sum()) / (len(self.forth) + len(self.back))) if len(self.forth) else float("nan")

    def nsd(self, tolerance: float) -> float:
        """Normalised surface Dice: share of all surface voxels of both masks at most `tolerance` mm away (Nikolov et al. 2018); NaN without surfaces."""
        if not len(self.forth):
            return float("nan")
        within = sum(int((away <= tolerance * (1 + _ROUNDING)).sum()) for away in (self.forth, self.back))
        return within / (len(self.forth) + len(self.back))


def _surface(mask: np.ndarray) -> np.ndarray:
    return np.asarray(mask & ~ndimage.binary_erosion(mask))  # faces; what lies beyond the volume counts as outside
