"""Reading a volume on the grid of a crop: one trilinear interpolation, compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numba
import numpy as np

FLAGS = {"nnan", "nsz", "contract", "reassoc"}  # what it takes to vectorise; coordinates are never NaN


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """The function as machine code, kept on disk where there is a folder to write to (else made anew in every process)."""
    try:
        return numba.njit(function, cache=True, nogil=True, fastmath=FLAGS, error_model="numpy")  # type: ignore[no-any-return]
    except RuntimeError:
        return numba.njit(function, nogil=True, fastmath=FLAGS, error_model="numpy")  # type: ignore[no-any-return]


@_compiled
def _linear(source: np.ndarray, affine: np.ndarray, out: np.ndarray) -> None:
    channels, depth, height, width = source.shape
    zero, step_z, step_y, step_x = np.float32(0), np.float32(affine[0, 2]), np.float32(affine[1, 2]), np.float32(affine[2, 2])
    end_z, end_y, end_x = np.float32(depth - 1), np.float32(height - 1), np.float32(width - 1)
    last_z, last_y, last_x = np.int32(depth - 2), np.int32(height - 2), np.int32(width - 2)
    row, plane = np.int32(width), np.int32(width * height)
    for channel in range(channels):
        values = source[channel].reshape(-1)
        for z in range(out.shape[1]):
            for y in range(out.shape[2]):
                start_z = np.float32(affine[0, 0] * z + affine[0, 1] * y + affine[0, 3])
                start_y = np.float32(affine[1, 0] * z + affine[1, 1] * y + affine[1, 3])
                start_x = np.float32(affine[2, 0] * z + affine[2, 1] * y + affine[2, 3])
                line = out[channel, z, y]
                for index in range(out.shape[3]):
                    x = np.float32(np.int32(index))
                    at_z = min(max(start_z + x * step_z, zero), end_z)
                    at_y = min(max(start_y + x * step_y, zero), end_y)
                    at_x = min(max(start_x + x * step_x, zero), end_x)
                    i, j, k = min(np.int32(at_z), last_z), min(np.int32(at_y), last_y), min(np.int32(at_x), last_x)
                    w = at_x - np.float32(k)
                    p = np.uint32(i * plane + j * row + k)
                    a, b, c, d = values[p], values[p + row], values[p + plane], values[p + plane + row]
                    a += w * (values[p + 1] - a)
                    b += w * (values[p + row + 1] - b)
                    c += w * (values[p + plane + 1] - c)
                    d += w * (values[p + plane + row + 1] - d)
                    v = at_y - np.float32(j)
                    a += v * (b - a)
                    c += v * (d - c)
                    line[index] = a + (at_z - np.float32(i)) * (c - a)


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
    out = np.empty((len(source), *size), np.float32)
    _linear(np.ascontiguousarray(source, np.float32), np.ascontiguousarray(affine, np.float64), out)
    return out
