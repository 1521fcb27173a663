"""Cubic resampling as three matrix products; the same numbers as nnU-Net's default.

Cubic spline interpolation along a grid is linear in the voxels and separable, so that one small matrix per axis,
computed once per pair of lengths, replaces the evaluation of splines at every voxel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import ndimage
from threadpoolctl import ThreadpoolController

SEPARATE_Z_ANISOTROPY = 3.0  # nnU-Net resamples an axis by itself when its spacing is over three times the finest


@lru_cache(maxsize=256)
def axis_matrix(old: int, new: int, order: int) -> np.ndarray:
    """The (new, old) float32 matrix that resizes an axis, outer voxel faces kept, edge values repeated beyond them.

    Args:
        old, new: voxels of the axis before and after.
        order: of the spline; 0 picks the nearest voxel.
    """
    if order == 0:
        nearest = np.floor((np.arange(new) + 0.5) * old / new - 0.5 + 0.5).clip(0, old - 1).astype(int)
        return np.eye(old, dtype=np.float32)[nearest]
    columns = [ndimage.zoom(unit, new / old, order=order, mode="nearest", grid_mode=True) for unit in np.eye(old)]
    return np.ascontiguousarray(np.stack(columns, axis=1), dtype=np.float32)


def resample(array: np.ndarray, shape: Sequence[int], spacing: Sequence[float], target: Sequence[float], order: int = 3, order_z: int = 0) -> np.ndarray:
    """Resize (C, z, y, x) to `shape`; equal to nnU-Net's ``resample_data_or_seg_to_shape`` with its default arguments.

    Values are clipped to the range of what was interpolated: the channel, or each slice where a coarse axis is
    resampled by itself.

    Args:
        array: (C, z, y, x) float32.
        shape: new (z, y, x) voxels.
        spacing, target: mm before and after; they decide whether a coarse axis is resampled separately.
        order: spline order.
        order_z: along a separately resampled axis.
    """
    if tuple(array.shape[1:]) == tuple(shape):
        return array
    coarse = separate_axis(spacing, target)
    axes = [axis for axis in range(3) if axis != coarse]
    together = tuple(axis + 1 for axis in axes)
    result = array.astype(np.float32, copy=False)
    with _blas().limit(limits=1, user_api="blas"):  # the last bits depend on the number of threads
        # shrinking axes first, so that the products stay small
        for axis in sorted(axes, key=lambda a: shape[a] / array.shape[a + 1]):
            result = _along(result, axis + 1, axis_matrix(array.shape[axis + 1], shape[axis], order))
        result = np.clip(result, array.min(together, keepdims=True), array.max(together, keepdims=True))
        if coarse is not None:
            result = _along(result, coarse + 1, axis_matrix(array.shape[coarse + 1], shape[coarse], order_z))
    return np.ascontiguousarray(result)


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def separate_axis(spacing: Sequence[float], target: Sequence[float]) -> int | None:
    """The coarse axis that is resampled by itself (of the old spacing, else of the new one), or None."""
    for mm in (np.asarray(spacing, float), np.asarray(target, float)):
        if mm.max() / mm.min() > SEPARATE_Z_ANISOTROPY:
            coarsest = np.flatnonzero(mm == mm.max())
            return int(coarsest[0]) if len(coarsest) == 1 else None
    return None


def _along(array: np.ndarray, axis: int, matrix: np.ndarray) -> np.ndarray:
    if matrix.shape[0] == matrix.shape[1]:
        return array
    if axis == array.ndim - 1:
        return array @ matrix.T
    lead, tail = array.shape[:axis], array.shape[axis + 1 :]
    blocks = array.reshape(-1, array.shape[axis], int(np.prod(tail)))
    return np.matmul(matrix, blocks).reshape(*lead, len(matrix), *tail)
