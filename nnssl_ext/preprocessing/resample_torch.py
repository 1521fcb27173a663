"""Cubic resampling on a CUDA card (or any other device of PyTorch); apart from `resample`, whose processes need no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nnssl_ext.preprocessing.resample import axis_matrix, separate_axis


def resample_on(
    device: torch.device | str,
    array: np.ndarray,
    shape: Sequence[int],
    spacing: Sequence[float],
    target: Sequence[float],
    order: int = 3,
    order_z: int = 0,
) -> np.ndarray:
    """`resample` on a device: the same arguments, the same result up to float32's rounding; TensorFloat-32 is not used."""
    if tuple(array.shape[1:]) == tuple(shape):
        return array
    coarse = separate_axis(spacing, target)
    fine = sorted((axis for axis in (1, 2, 3) if axis - 1 != coarse), key=lambda axis: shape[axis - 1] / array.shape[axis])
    volume = torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(device)
    low, high = volume.amin(fine, keepdim=True), volume.amax(fine, keepdim=True)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for axis in fine:  # shrinking axes first, so that the products stay small
            volume = _along(volume, axis, shape[axis - 1], order)
        volume = volume.clamp(low, high)
        if coarse is not None:
            volume = _along(volume, coarse + 1, shape[coarse], order_z)
    finally:
        torch.set_float32_matmul_precision(precision)
    result: np.ndarray = volume.contiguous().cpu().numpy()
    return result


def _along(volume: torch.Tensor, axis: int, new: int, order: int) -> torch.Tensor:
    if volume.shape[axis] == new:
        return volume
    matrix = torch.from_numpy(axis_matrix(volume.shape[axis], new, order)).to(volume)
    return torch.tensordot(matrix, volume, ([1], [axis])).movedim(0, axis)
