"""Cubic resampling as products with banded matrices; the same numbers as nnU-Net's default.

Cubic spline interpolation along a grid is linear in the voxels and separable, so that one small matrix per axis,
computed once per pair of lengths, replaces the evaluation of splines at every voxel. A new voxel depends on the old
ones around it only: entries fall by 0.27 per voxel, and the products leave out what is below float32's resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import ndimage
from threadpoolctl import ThreadpoolController

SEPARATE_Z_ANISOTROPY = 3.0  # nnU-Net resamples an axis by itself when its spacing is over three times the finest
_ROWS = 32  # new voxels of a band; the fastest of 16 to 128
_SMALLEST = 1e-8  # entries of a matrix below it count as 0: they move a value by less than 1e-7 of the range
_EDGE = 12  # voxels by which edge values are repeated before a spline is fitted, as scipy does

Band = tuple[slice, slice, np.ndarray]  # new voxels, the old voxels that they depend on, their matrix


def resample(array: np.ndarray, shape: Sequence[int], spacing: Sequence[float], target: Sequence[float], order: int = 3, order_z: int = 0) -> np.ndarray:
    """Resize (C, z, y, x) to `shape`; equal to nnU-Net's ``resample_data_or_seg_to_shape`` with its default arguments.

    Values are clipped to the range of what was interpolated: the channel, or each slice where a coarse axis is
    resampled by itself. Memory beyond array and result: one channel with an axis or two resized, smaller than the larger of
    the channel before and after (and as much again where y or x is the coarse axis).

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
    result = np.empty((len(array), *shape), np.float32)
    with _blas().limit(limits=1, user_api="blas"):  # the last bits depend on the number of threads
        for volume, new in zip(array, result):
            if coarse is None:
                _resize(volume, new, order)
            else:
                axes = (coarse, *(axis for axis in range(3) if axis != coarse))
                _resize_separately(volume.transpose(axes), new.transpose(axes), order, order_z)
    return result


def separate_axis(spacing: Sequence[float], target: Sequence[float]) -> int | None:
    """The coarse axis that is resampled by itself (of the old spacing, else of the new one), or None."""
    for mm in (np.asarray(spacing, float), np.asarray(target, float)):
        if mm.max() / mm.min() > SEPARATE_Z_ANISOTROPY:
            coarsest = np.flatnonzero(mm == mm.max())
            return int(coarsest[0]) if len(coarsest) == 1 else None
    return None


def axis_matrix(old: int, new: int, order: int) -> np.ndarray:
    """The (new, old) float64 matrix that resizes an axis, outer voxel faces kept, edge values repeated beyond them.

    It is the product of the values of the B-splines at the new voxels and the filter that turns voxels into their coefficients.

    Args:
        old, new: voxels of the axis before and after.
        order: of the spline; 0 picks the nearest voxel.

    Source: Unser, Aldroubi & Eden 1993, B-spline signal processing, doi:10.1109/78.193220.
    """
    from scipy.interpolate import BSpline  # here: a third of a second that no command should wait for before it says what it does

    if order == 0:
        return np.eye(old)[nearest_voxels(old, new)]
    coefficients = ndimage.spline_filter1d(np.pad(np.eye(old), ((_EDGE, _EDGE), (0, 0)), "edge"), order, axis=0, mode="nearest")
    knots = np.arange(len(coefficients) + order + 1) - (order + 1) / 2
    matrix: np.ndarray = BSpline.design_matrix((np.arange(new) + 0.5) * (old / new) - 0.5 + _EDGE, knots, order) @ coefficients
    return matrix


def nearest_voxels(old: int, new: int) -> np.ndarray:
    """Index of the old voxel that is nearest to each new one, (new,); the later one of two."""
    at: np.ndarray = np.floor((np.arange(new) + 0.5) * (old / new) - 0.5 + 0.5).clip(0, old - 1).astype(int)
    return at


@lru_cache(maxsize=256)
def _bands(old: int, new: int, order: int) -> list[Band]:
    matrix = axis_matrix(old, new, order).astype(np.float32)
    bands = []
    for first in range(0, new, _ROWS):
        rows = matrix[first : first + _ROWS]
        used = np.flatnonzero((abs(rows) > _SMALLEST).any(0))
        columns = slice(int(used[0]), int(used[-1]) + 1)
        bands.append((slice(first, first + len(rows)), columns, np.ascontiguousarray(rows[:, columns])))
    return bands


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def _resize(volume: np.ndarray, out: np.ndarray, order: int) -> None:
    """Along all axes, the first one when the volume is smallest."""
    limits = volume.min(), volume.max()
    if len(volume) == len(out):
        _resize_planes(volume, out, order)
    elif len(out) < len(volume):
        _resize_planes(_resize_first(volume, np.empty((len(out), *volume.shape[1:]), np.float32), order), out, order)
    else:
        _resize_first(_resize_planes(volume, np.empty((len(volume), *out.shape[1:]), np.float32), order), out, order)
    np.clip(out, *limits, out=out)


def _resize_separately(volume: np.ndarray, out: np.ndarray, order: int, order_first: int) -> None:
    """The planes on their own, then along the first axis."""
    planes = _resize_planes(volume, np.empty((len(volume), *out.shape[1:]), np.float32), order)
    for plane, old in zip(planes, volume):
        np.clip(plane, old.min(), old.max(), out=plane)
    _resize_first(planes, out, order_first)


def _resize_first(volume: np.ndarray, out: np.ndarray, order: int) -> np.ndarray:
    old = np.ascontiguousarray(volume, np.float32).reshape(len(volume), -1)
    for rows, columns, matrix in _bands(len(old), len(out), order):
        new = out[rows]
        if new.flags.c_contiguous:
            np.matmul(matrix, old[columns], out=new.reshape(len(new), -1))
        else:
            new[...] = (matrix @ old[columns]).reshape(new.shape)
    return out


def _resize_planes(volume: np.ndarray, out: np.ndarray, order: int) -> np.ndarray:
    """Plane by plane, so that what lies between the two axes stays in the processor's cache."""
    (rows, columns), (new_rows, new_columns) = volume.shape[1:], out.shape[1:]
    between = np.empty((new_rows, columns), np.float32)
    for old, new in zip(volume, out):
        plane = np.ascontiguousarray(old, np.float32)
        for band, used, matrix in _bands(rows, new_rows, order):
            np.matmul(matrix, plane[used], out=between[band])
        for band, used, matrix in _bands(columns, new_columns, order):
            np.matmul(between[:, used], matrix.T, out=new[:, band])
    return out
