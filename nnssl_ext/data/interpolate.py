"""Reading a volume on the grid of a crop: one trilinear interpolation, compiled.

A row of the grid takes three loops: two compute (vectorised), the one between them only loads. In one loop nothing would be
vectorised.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnssl_ext.data.compiled import compiled


@compiled
def _linear(pairs: np.ndarray, shape: tuple[int, int, int, int], affine: np.ndarray, out: np.ndarray) -> None:
    row, plane, width = np.uint32(shape[3]), np.uint32(shape[2] * shape[3]), out.shape[3]
    place, parts, corners = np.empty(width, np.uint32), np.empty((3, width), np.float32), np.empty((4, width), np.uint64)
    values = corners.view(np.float32)
    for z in range(out.shape[1]):
        for y in range(out.shape[2]):
            _place(affine, z, y, shape, place, parts)
            for channel in range(out.shape[0]):
                _load(pairs[channel], place, row, plane, corners)
                _blend(values, parts, out[channel, z, y])


@compiled
def _place(affine: np.ndarray, z: int, y: int, shape: tuple[int, int, int, int], place: np.ndarray, parts: np.ndarray) -> None:
    """Number of the first of the eight voxels around each point of a row, and the point's distance from it along each axis."""
    start_z = np.float32(affine[0, 0] * z + affine[0, 1] * y + affine[0, 3])
    start_y = np.float32(affine[1, 0] * z + affine[1, 1] * y + affine[1, 3])
    start_x = np.float32(affine[2, 0] * z + affine[2, 1] * y + affine[2, 3])
    zero, step_z, step_y, step_x = np.float32(0), np.float32(affine[0, 2]), np.float32(affine[1, 2]), np.float32(affine[2, 2])
    end_z, end_y, end_x = np.float32(shape[1] - 1), np.float32(shape[2] - 1), np.float32(shape[3] - 1)
    last_z, last_y, last_x = np.int32(shape[1] - 2), np.int32(shape[2] - 2), np.int32(shape[3] - 2)
    row, plane = np.int32(shape[3]), np.int32(shape[2] * shape[3])
    for index in range(len(place)):
        x = np.float32(np.int32(index))
        at_z = min(max(start_z + x * step_z, zero), end_z)
        at_y = min(max(start_y + x * step_y, zero), end_y)
        at_x = min(max(start_x + x * step_x, zero), end_x)
        i, j, k = min(np.int32(at_z), last_z), min(np.int32(at_y), last_y), min(np.int32(at_x), last_x)
        place[index] = i * plane + j * row + k
        parts[0, index], parts[1, index], parts[2, index] = at_z - np.float32(i), at_y - np.float32(j), at_x - np.float32(k)


@compiled
def _load(pairs: np.ndarray, place: np.ndarray, row: int, plane: int, corners: np.ndarray) -> None:
    for index in range(len(place)):
        p = place[index]
        corners[0, index], corners[1, index] = pairs[p], pairs[p + row]
        corners[2, index], corners[3, index] = pairs[p + plane], pairs[p + plane + row]


@compiled
def _blend(values: np.ndarray, parts: np.ndarray, out: np.ndarray) -> None:
    for index in range(len(out)):
        left, right, w, v = 2 * index, 2 * index + 1, parts[2, index], parts[1, index]
        a = values[0, left] + w * (values[0, right] - values[0, left])
        b = values[1, left] + w * (values[1, right] - values[1, left])
        c = values[2, left] + w * (values[2, right] - values[2, left])
        d = values[3, left] + w * (values[3, right] - values[3, left])
        a += v * (b - a)
        c += v * (d - c)
        out[index] = a + parts[0, index] * (c - a)


def interpolate(source: np.ndarray, affine: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Trilinear values of a volume at ``affine @ (z, y, x, 1)`` for every voxel (z, y, x) of a grid.

    Args:
        source: (C, z, y, x) float32, fewer than 2^31 voxels; beyond its outermost voxel centres their values continue.
        affine: (3, 4), from a voxel of the grid to a voxel of `source`.
        size: voxels of the grid.

    Returns:
        (C, *size) float32.
    """
    if 1 in source.shape[1:]:
        source = np.pad(source, [(0, 0), *((0, int(n == 1)) for n in source.shape[1:])], mode="edge")
    source = np.ascontiguousarray(source, np.float32)
    voxels = source[0].size
    pairs = np.ndarray((len(source), voxels - 1), np.uint64, source, strides=(4 * voxels, 4))  # each voxel and its right neighbour, loaded together
    out = np.empty((len(source), *size), np.float32)
    _linear(pairs, source.shape, np.ascontiguousarray(affine, np.float64), out)
    return out
