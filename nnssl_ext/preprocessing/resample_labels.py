"""Linear resampling of label maps; the same labels as nnU-Net's default.

Each label's share of a new voxel is interpolated linearly and the largest one wins. Only where the (up to) eight old
voxels around a new one differ is there anything to count, so that no label is expanded into a volume of its own and
the time doesn't depend on the number of labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from nnssl_ext.preprocessing.resample import nearest_voxels, separate_axis

_CHUNK = 1 << 15  # mixed voxels counted at once, so that they stay in the processor's cache

Axis = list[tuple[np.ndarray, np.ndarray]]  # for the lower and the upper old voxel: its index and weight at each new voxel


def resample_labels(labels: np.ndarray, shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> np.ndarray:
    """Resize (z, y, x) labels to `shape`; equal to nnU-Net's ``resample_data_or_seg_to_shape`` with ``is_seg=True, order=1, order_z=0``.

    A tie goes to the nearest old voxel's label if that takes part in it, else to the smallest label (batchgenerators >= 0.25.5;
    earlier versions took the largest one). A coarse axis is resampled by itself and takes the nearest slice.

    Args:
        labels: (z, y, x), any dtype.
        shape: new (z, y, x) voxels.
        spacing, target: mm before and after; they decide whether a coarse axis is resampled separately.
    """
    if labels.shape == tuple(shape):
        return labels
    coarse = separate_axis(spacing, target)
    slices = np.arange(0)
    if coarse is not None:
        needed, slices = np.unique(nearest_voxels(labels.shape[coarse], shape[coarse]), return_inverse=True)
        labels = labels.take(needed, coarse)
    sizes = [(old, old if axis == coarse else new) for axis, (old, new) in enumerate(zip(labels.shape, shape))]
    result = labels[np.ix_(*(nearest_voxels(*size) for size in sizes))]
    _vote(labels, [_linear(*size) for size in sizes], result)
    return result if coarse is None else result.take(slices, coarse)


def _linear(old: int, new: int) -> Axis:
    """In the order of scipy's operations, so that ties are the same ties."""
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    lower = np.floor(at).astype(int)
    weight = 1 - (at - lower)
    return [(lower.clip(0), weight)] if old == new else [(lower.clip(0), weight), ((lower + 1).clip(0, old - 1), 1 - weight)]


def _vote(labels: np.ndarray, axes: Sequence[Axis], result: np.ndarray) -> None:
    """Replace the nearest label, where several labels are around, by the one of the largest interpolated share."""
    mixed = _mixed(labels)[np.ix_(*(axis[0][0] for axis in axes))]
    places, found, flat = np.flatnonzero(mixed), result.reshape(-1), labels.reshape(-1)
    strides = (labels.shape[1] * labels.shape[2], labels.shape[2], 1)
    for first in range(0, len(places), _CHUNK):
        chunk = places[first : first + _CHUNK]
        at = np.unravel_index(chunk, mixed.shape)
        corners = [[(index[p] * stride, weight[p]) for index, weight in axis] for axis, p, stride in zip(axes, at, strides)]
        around = np.stack([flat[z + y + x] for (z, _), (y, _), (x, _) in product(*corners)])
        shares = np.stack([z * y * x for (_, z), (_, y), (_, x) in product(*corners)])
        found[chunk] = _largest(around, shares, found[chunk])


def _largest(around: np.ndarray, shares: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """The label with the largest sum of shares, (n,), of labels and shares (corners, n)."""
    low, high = around.min(0), around.max(0)
    ahead = _share(around, shares, high) - _share(around, shares, low)
    winner = np.where(ahead > 0, high, np.where(ahead < 0, low, nearest))
    several = np.flatnonzero(((around != low) & (around != high)).any(0))  # more than two labels
    winner[several] = _largest_of_several(around[:, several], shares[:, several], nearest[several])
    return winner


def _largest_of_several(around: np.ndarray, shares: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    winner, best = nearest, _share(around, shares, nearest)
    for label in around:
        total = _share(around, shares, label)
        better = (total > best) | ((total == best) & (winner != nearest) & (label < winner))
        winner, best = np.where(better, label, winner), np.where(better, total, best)
    return winner


def _share(around: np.ndarray, shares: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Sum of a label's shares, (n,), corner after corner: sum() takes them in another order where n is 1, and ties would differ."""
    total = np.zeros(label.shape)
    for corner, share in zip(around, shares):
        total += np.where(corner == label, share, 0)
    return total


def _mixed(labels: np.ndarray) -> np.ndarray:
    """Whether an old voxel and its next ones along the axes, eight in all, differ in their labels, (z, y, x)."""
    low = high = labels
    for axis in range(3):
        after = np.minimum(np.arange(labels.shape[axis]) + 1, labels.shape[axis] - 1)
        low, high = np.minimum(low, low.take(after, axis)), np.maximum(high, high.take(after, axis))
    return low != high
