"""Where a crop lies in its case: position, rotation, zoom and mirroring as one affine map.

An affine is (3, 4) float64 and maps a voxel (z, y, x) of the crop to a (fractional) voxel of the stored case. Landmarks,
overlaps and dense correspondences of views follow from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnssl_ext.core.geometry import Box

_EXACT = 1e-6  # voxels; what rounding may add to a corner


def make_affine(
    center: Sequence[float], size: Sequence[int], spacing: Sequence[float], rotation: np.ndarray, zoom: np.ndarray, mirrored: np.ndarray
) -> np.ndarray:
    """The affine of a crop.

    Args:
        center: voxel of the case at the crop's centre.
        size: voxels of the crop, (z, y, x).
        spacing: mm of the case, (z, y, x).
        rotation: (3, 3) orthogonal, in mm, over the axes (z, y, x).
        zoom: edge of a crop's voxel over that of a case's voxel, by axis of the crop (3,); above 1 shows more.
        mirrored: axes of the crop, bool (3,).
    """
    edge = np.asarray(spacing, float)
    signed = np.where(mirrored, -1.0, 1.0) * zoom
    matrix = rotation * edge / edge[:, None] * signed  # exactly +-1 on the diagonal without rotation and zoom
    return np.column_stack((matrix, np.asarray(center, float) - matrix @ ((np.asarray(size) - 1) / 2)))


def rotation_matrix(degrees: np.ndarray) -> np.ndarray:
    """Rotation about the axes z, then y, then x, by these angles, as (3, 3) over (z, y, x)."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        turn = np.eye(3)
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def to_case(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Voxels of the crop (..., 3) as voxels of the case."""
    return np.asarray(points) @ affine[:, :3].T + affine[:, 3]  # type: ignore[no-any-return]


def to_crop(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Voxels of the case (..., 3) as voxels of the crop."""
    return (np.asarray(points) - affine[:, 3]) @ np.linalg.inv(affine[:, :3]).T  # type: ignore[no-any-return]


def between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The affine from voxels of one crop to voxels of another crop of the same case."""
    inverse = np.linalg.inv(second[:, :3])
    return np.column_stack((inverse @ first[:, :3], inverse @ (first[:, 3] - second[:, 3])))


def bounds(affine: np.ndarray, size: Sequence[int]) -> Box:
    """The smallest box of the case's voxels from which a crop of `size` voxels can be interpolated."""
    matrix, reach = affine[:, :3], np.asarray(size) - 1
    low = affine[:, 3] + np.minimum(matrix * reach, 0).sum(1)
    high = affine[:, 3] + np.maximum(matrix * reach, 0).sum(1)
    first, last = np.floor(low + _EXACT).astype(int), np.ceil(high - _EXACT).astype(int)
    return tuple((a, b + 1) for a, b in zip(first.tolist(), last.tolist()))


def is_slicing(affine: np.ndarray) -> bool:
    """Whether a crop's voxels are voxels of the case: shifted by whole voxels, perhaps mirrored."""
    return bool((np.abs(affine[:, :3]) == np.eye(3)).all() and (affine[:, 3] % 1 == 0).all())


@dataclass(frozen=True)
class Spatial:
    """Random rotation, zoom and mirroring, each by its own chance.

    Args:
        rotation: largest angle about the axes (z, y, x) in degrees, in mm-space; uniform in both directions.
        p_rotation: probability of any rotation.
        zoom: range of each axis (z, y, x), uniform; above 1 shows more of the case. One draw for all axes.
        p_zoom: probability of any zoom.
        mirror: axes that are mirrored half of the time.
        p_mirror: probability that any axis may be.
    """

    rotation: tuple[float, ...] = (0.0, 0.0, 0.0)
    p_rotation: float = 0.0
    zoom: tuple[tuple[float, float], ...] = ((1.0, 1.0),) * 3
    p_zoom: float = 0.0
    mirror: tuple[bool, ...] = (True, True, True)
    p_mirror: float = 1.0

    def within(self, size: Sequence[int]) -> Spatial:
        """The same for crops of `size` voxels, (z, y, x): a slice, which has one voxel along an axis, is turned, zoomed and mirrored in its plane."""
        thin = [edge == 1 for edge in size]
        if not any(thin):
            return self
        across = [any(thin[:axis] + thin[axis + 1 :]) for axis in range(3)]  # a turn about this axis would leave the slice
        return replace(
            self,
            rotation=tuple(0.0 if leaves else angle for leaves, angle in zip(across, self.rotation)),
            zoom=tuple((1.0, 1.0) if one else bounds for one, bounds in zip(thin, self.zoom)),
            mirror=tuple(not one and may for one, may in zip(thin, self.mirror)),
        )

    def draw_zoom(self, rng: np.random.Generator) -> np.ndarray:
        """Factor of each axis; draws nothing where it is never zoomed."""
        if not self.p_zoom or rng.random() >= self.p_zoom:
            return np.ones(3)
        place = rng.random()
        return np.array([low + place * (high - low) for low, high in self.zoom])

    def draw_mirror(self, rng: np.random.Generator) -> np.ndarray:
        """Mirrored axes (3,)."""
        if self.p_mirror < 1 and rng.random() >= self.p_mirror:
            return np.zeros(3, bool)
        return rng.integers(0, 2, 3).astype(bool) & self.mirror if any(self.mirror) else np.zeros(3, bool)

    def draw_rotation(self, rng: np.random.Generator) -> np.ndarray:
        """Rotation (3, 3)."""
        if not self.p_rotation or rng.random() >= self.p_rotation:
            return np.eye(3)
        return rotation_matrix(rng.uniform(-1, 1, 3) * self.rotation)

    def draw_turn(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Rotation (3, 3) and mirrored axes (3,)."""
        mirrored = self.draw_mirror(rng)
        return self.draw_rotation(rng), mirrored


NONE = Spatial(mirror=(False, False, False))
MIRROR = Spatial()
MILD = Spatial((10.0, 10.0, 10.0), 0.5, ((0.9, 1.1),) * 3, 0.5)
NNUNET = Spatial((30.0, 30.0, 30.0), 0.2, ((0.7, 1.4),) * 3, 0.2)
NNUNET_THICK = Spatial((180.0, 0.0, 0.0), 0.2, ((1.0, 1.0), (0.7, 1.4), (0.7, 1.4)), 0.2)  # within slices only


def nnunet(patch_size: Sequence[int]) -> Spatial:
    """nnU-Net's default strength; within slices where they are more than three times as wide as the patch has slices.

    Source: Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, supplementary note 2.
    """
    return NNUNET_THICK if max(patch_size) > 3 * patch_size[0] else NNUNET
