"""Masks of blocks and tokens: True = hidden, everywhere in the project."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnssl_ext.data.views import Crop, MultiCrop, View
from nnssl_ext.preprocessing.store import CaseStore

_VOLUME = (0.2, 0.8)  # of a box, over the volume that is hidden in all; uniform
_ROUNDING = 1e-9  # of a share times a number, such as 0.29 * 100
_BLOCKS = 27  # of a mask, so that what is hidden has visible neighbours
_ASPECT = 2.0  # an edge is longer or shorter than a cube's by this factor at most, before all three are scaled to the volume; log-uniform


def block_grid(patch_size: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """Blocks along each axis; the last block of an axis may be cut."""
    return tuple(-(-size // edge) for size, edge in zip(patch_size, block))


def random_blocks(grid: Sequence[int], ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Hide exactly round(ratio * blocks) blocks, uniformly; at least one stays visible and one is hidden.

    Args:
        grid: blocks along (z, y, x), two or more in all.
        ratio: share to hide, in (0, 1).

    Returns:
        bool (d, h, w), True = hidden.
    """
    count = int(np.prod(grid))
    hidden = np.zeros(count, bool)
    hidden[rng.permutation(count)[: hidden_count(count, ratio)]] = True
    return hidden.reshape(tuple(grid))


def hidden_count(blocks: int, ratio: float) -> int:
    """How many of two or more blocks `random_blocks` hides."""
    return min(max(round(ratio * blocks), 1), blocks - 1)


def random_boxes(grid: Sequence[int], count: int, rng: np.random.Generator) -> np.ndarray:
    """Hide exactly `count` cells as a union of random boxes.

    Boxes may stick out of the grid, so that cells at its border are hidden about as often as those in its middle: boxes
    inside a 12^3 grid would hide its corners in 3.5 % of the masks and its middle in 92 %. The last box is filled layer by
    layer along one of its axes, the last layer row by row.

    Args:
        grid: cells along (z, y, x).
        count: cells to hide, from 0 to all.

    Returns:
        bool (d, h, w), True = hidden.
    """
    hidden, left = np.zeros(tuple(grid), bool), count
    while left:
        edges = _box_edges(grid, rng.uniform(*_VOLUME) * count, _ASPECT ** rng.uniform(-1, 1, 3))
        starts = rng.integers(1 - np.array(edges), grid).tolist()
        box = np.moveaxis(hidden[tuple(slice(max(0, start), start + edge) for start, edge in zip(starts, edges))], rng.integers(3), 0)
        fresh = np.nonzero(~box)
        box[tuple(axis[:left] for axis in fresh)] = True
        left -= min(left, len(fresh[0]))
    return hidden


def _box_edges(grid: Sequence[int], volume: float, aspect: np.ndarray) -> list[int]:
    """Whole edges in about these proportions and with about this volume: an axis that is too short is filled, and the others make up for it."""
    edges, axes = [1, 1, 1], sorted(range(3), key=lambda axis: grid[axis] / aspect[axis])
    while axes:
        scale = (volume / math.prod(aspect[axis] for axis in axes)) ** (1 / len(axes))
        axis = axes.pop(0)
        edges[axis] = min(grid[axis], max(1, round(scale * aspect[axis])))
        volume /= edges[axis]
    return edges


def stratified_counts(strata: int, low: int, high: int, rng: np.random.Generator) -> np.ndarray:
    """One whole number from each of equal strata of [low, high], in their order; the mean of stratum k is low + (high - low) * (k + 0.5) / strata."""
    values = low + (high - low) * (np.arange(strata) + rng.random(strata)) / max(strata, 1)
    return np.floor(values + rng.random(strata)).astype(int)  # rounded at random, so that no mean moves


def mask_block(patch_size: Sequence[int], edge: int = 16) -> tuple[int, ...]:
    """Edge lengths of the blocks: `edge` voxels, but at least four blocks along an axis and no fewer than 2 voxels each (1 on a thinner axis)."""
    return tuple(min(edge, max(min(2, size), size // 4)) for size in patch_size)


def stride_block(patch_size: Sequence[int], strides: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The coarsest of an encoder's strides, finest first, of which the patch holds 27 blocks or more; the finest where it never does."""
    return next((stride for stride in reversed(strides) if math.prod(block_grid(patch_size, stride)) >= _BLOCKS), strides[0])


@dataclass(frozen=True)
class MaskedCrop:
    """One random crop, as view "image", with `ratio` of its blocks hidden.

    Args:
        crop: where it comes from.
        block: voxels of a block, (z, y, x).
        ratio: share of blocks to hide, in (0, 1).
        cell: voxels of a cell of the mask, (z, y, x), where it is finer than the blocks: a whole number of cells in each block.
    """

    crop: Crop
    block: tuple[int, ...]
    ratio: float
    cell: tuple[int, ...] | None = None

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        view, size = self.crop.sample(store, case, rng)["image"], self.crop.patch_size
        hidden = random_blocks(block_grid(size, self.block), self.ratio, rng)
        cells = np.ix_(*(np.arange(0, n, cell) // edge for n, cell, edge in zip(size, self.cell or self.block, self.block)))
        return {"image": replace(view, mask=hidden[cells])}


@dataclass(frozen=True)
class MaskedMultiCrop:
    """Multi-crop views whose global ones carry masks of boxes; the crops are those of `crops`, bit for bit.

    Of the global crops of a batch exactly floor(probability * crops) have hidden cells (the masks of others hide nothing).
    How many is stratified over [ceil(ratio[0] * cells), floor(ratio[1] * cells)]. A sample that is drawn by itself is a
    batch of one.

    Args:
        crops: the views.
        token: voxels of a cell, (z, y, x).
        probability: share of the global crops that have hidden cells, [0, 1].
        ratio: range of the share of hidden cells in such a crop, [0, 1].
        counts: cells to hide in each global crop of this sample; None: not drawn yet.

    Source: Zhou et al. 2022, arXiv:2111.07832 (masks of blocks); Oquab et al. 2023, arXiv:2304.07193 (over the batch).
    """

    crops: MultiCrop
    token: tuple[int, ...]
    probability: float = 0.5
    ratio: tuple[float, float] = (0.3, 0.6)
    counts: tuple[int, ...] | None = None

    def of_batch(self, count: int, rng: np.random.Generator) -> list[MaskedMultiCrop]:
        """The specification of each of a batch's `count` samples."""
        cells = math.prod(block_grid(self.crops.global_size, self.token))
        low, high = math.ceil(self.ratio[0] * cells - _ROUNDING), math.floor(self.ratio[1] * cells + _ROUNDING)
        masked = math.floor(self.probability * 2 * count + _ROUNDING)
        counts = np.zeros(2 * count, int)
        counts[rng.permutation(2 * count)[:masked]] = stratified_counts(masked, min(low, high), high, rng)
        return [replace(self, counts=tuple(pair)) for pair in counts.reshape(count, 2).tolist()]

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        views = self.crops.sample(store, case, rng)
        counts = self.counts or self.of_batch(1, rng)[0].counts or ()
        for i, count in enumerate(counts):
            view = views[f"global_{i}"]
            views[f"global_{i}"] = replace(view, mask=random_boxes(block_grid(self.crops.global_size, self.token), count, rng))
        return views
