"""Views: what a method reads of a case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nnssl_ext.core.geometry import Box, box_slices
from nnssl_ext.preprocessing.store import CaseStore


@dataclass(frozen=True)
class View:
    """One view of a case.

    Args:
        image: (C, z, y, x) float32.
        box: voxels of the stored case that it shows, half-open; may reach beyond the case, padded there.
        flips: whether each axis (z, y, x) was mirrored after reading.
        mask: bool grid (d, h, w), True = hidden; None when nothing is hidden.
    """

    image: np.ndarray
    box: Box
    flips: tuple[bool, bool, bool]
    mask: np.ndarray | None = None


class ViewSpec(Protocol):
    """What a method asks the loader for; a pure function of (store, case, rng)."""

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]: ...


def random_box(shape: Sequence[int], size: Sequence[int], rng: np.random.Generator) -> Box:
    """A box of `size` voxels, uniform over all positions inside `shape`; an axis that is too short is centred."""
    starts = [int(rng.integers(0, n - s + 1)) if n >= s else (n - s) // 2 for n, s in zip(shape, size)]
    return tuple((start, start + s) for start, s in zip(starts, size))


def read_box(store: CaseStore, case: int, box: Box) -> np.ndarray:
    """Voxels of `box`, (C, z, y, x) float32; outside the case the stored fill value of each channel (its background)."""
    shape = store.shape(case)
    inside = tuple((max(0, low), min(n, high)) for (low, high), n in zip(box, shape))
    crop = store.read(case, inside)
    if inside == box:
        return crop
    padded = np.empty((len(crop), *(high - low for low, high in box)), np.float32)
    padded[:] = np.asarray(store.fill(case), np.float32)[:, None, None, None]
    padded[box_slices(tuple((i - low, j - low) for (low, _), (i, j) in zip(box, inside)))] = crop
    return padded


def random_crop(store: CaseStore, case: int, size: Sequence[int], rng: np.random.Generator) -> View:
    """A uniformly placed crop, each axis mirrored with probability 1/2."""
    box = random_box(store.shape(case), size, rng)
    flips = tuple(bool(f) for f in rng.integers(0, 2, 3))
    image = np.flip(read_box(store, case, box), tuple(axis + 1 for axis in range(3) if flips[axis]))
    return View(np.ascontiguousarray(image), box, (flips[0], flips[1], flips[2]))


@dataclass(frozen=True)
class Crop:
    """One random mirrored crop of `patch_size` voxels, as view "image"."""

    patch_size: tuple[int, ...]

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        return {"image": random_crop(store, case, self.patch_size, rng)}
