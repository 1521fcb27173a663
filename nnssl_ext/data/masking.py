"""Masks of blocks and tokens: True = hidden, everywhere in the project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnssl_ext.data.views import Crop, View
from nnssl_ext.preprocessing.store import CaseStore


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
    hidden[rng.permutation(count)[: min(max(round(ratio * count), 1), count - 1)]] = True
    return hidden.reshape(tuple(grid))


def mask_block(patch_size: Sequence[int], edge: int = 16) -> tuple[int, ...]:
    """Edge lengths of the blocks: `edge` voxels, but at least four blocks along an axis and no fewer than 2 voxels each (1 on a thinner axis)."""
    return tuple(min(edge, max(min(2, size), size // 4)) for size in patch_size)


@dataclass(frozen=True)
class MaskedCrop:
    """One random crop, as view "image", with `ratio` of its blocks hidden.

    Args:
        crop: where it comes from.
        block: voxels of a block, (z, y, x).
        ratio: share of blocks to hide, in (0, 1).
    """

    crop: Crop
    block: tuple[int, ...]
    ratio: float

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        view = self.crop.sample(store, case, rng)["image"]
        return {"image": replace(view, mask=random_blocks(block_grid(self.crop.patch_size, self.block), self.ratio, rng))}
