"""Where to crop: uniform over all positions, or over those that hold enough of the body."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nnssl_ext.core.geometry import Box
from nnssl_ext.data.compiled import compiled
from nnssl_ext.preprocessing.store import BODY_CELL

_TRIES = 64  # positions drawn before the whole grid is searched


def whole(shape: Sequence[int]) -> Box:
    """All voxels of a case."""
    return tuple((0, n) for n in shape)


def random_box(within: Box, size: Sequence[int], rng: np.random.Generator, body: np.ndarray | None = None, minimum: float = 0.0) -> Box:
    """A box of `size` voxels, uniform over all positions inside `within` where it holds enough body.

    An axis that is too short is centred. After 64 tries the position comes from every 8th voxel of each axis: uniform over
    those that hold enough, or over the best ones where none does.

    Args:
        body: cells of the case that hold body, see `CaseStore.body`.
        minimum: share of the box's voxels that must lie in them, [0, 1].
    """
    firsts = [low if high - low >= s else low + (high - low - s) // 2 for (low, high), s in zip(within, size)]
    counts = [max(0, high - low - s) + 1 for (low, high), s in zip(within, size)]
    for _ in range(_TRIES):
        box = tuple((first + start, first + start + s) for first, start, s in zip(firsts, [int(rng.integers(0, n)) for n in counts], size))
        if body is None or body_share(body, box) >= minimum:
            return box
    assert body is not None
    return _search(firsts, counts, size, rng, body, minimum)


def iou(first: Box, second: Box) -> float:
    """Voxels that two boxes share over those that at least one of them holds, [0, 1]."""
    shared = math.prod(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a, b in zip(first, second))
    return shared / (sum(math.prod(high - low for low, high in box) for box in (first, second)) - shared)


def body_share(body: np.ndarray, box: Box) -> float:
    """Share of a box's voxels that lie in body cells; outside the case there is none."""
    low, high = np.array(box).T
    return float(_body_voxels(body, low, high)) / float(np.prod(high - low))


@compiled
def _body_voxels(body: np.ndarray, low: np.ndarray, high: np.ndarray) -> int:
    first = np.maximum(low // BODY_CELL, 0)
    last = np.minimum((high - 1) // BODY_CELL + 1, np.array(body.shape))
    total = 0
    for z in range(first[0], last[0]):
        depth = min(high[0], (z + 1) * BODY_CELL) - max(low[0], z * BODY_CELL)
        for y in range(first[1], last[1]):
            area = depth * (min(high[1], (y + 1) * BODY_CELL) - max(low[1], y * BODY_CELL))
            for x in range(first[2], last[2]):
                if body[z, y, x]:
                    total += area * (min(high[2], (x + 1) * BODY_CELL) - max(low[2], x * BODY_CELL))
    return total


def _overlap(starts: np.ndarray, size: int, cells: np.ndarray) -> np.ndarray:
    """Voxels of each cell in [start, start + size), (starts, cells)."""
    low, high = starts[:, None], starts[:, None] + size
    return np.maximum(0, np.minimum(high, (cells + 1) * BODY_CELL) - np.maximum(low, cells * BODY_CELL))


def _search(firsts: Sequence[int], counts: Sequence[int], size: Sequence[int], rng: np.random.Generator, body: np.ndarray, minimum: float) -> Box:
    axes = [first + np.unique([*range(0, count, BODY_CELL), count - 1]) for first, count in zip(firsts, counts)]
    held = body.astype(np.float32)
    for starts, s in zip(axes, size):  # the last axis of `held` becomes this axis' starts
        held = np.tensordot(held, _overlap(starts, s, np.arange(len(held))).astype(np.float32), (0, 1))
    enough = np.argwhere(held >= min(minimum * np.prod(size), held.max()))
    place = enough[rng.integers(len(enough))]
    return tuple((int(starts[i]), int(starts[i]) + s) for starts, i, s in zip(axes, place, size))
