"""Crops beside corrupted versions of themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from nnssl_ext.data.views import Crop, View
from nnssl_ext.preprocessing.store import CaseStore

Corruption = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # of (C, z, y, x); leaves its input as it is


@dataclass(frozen=True)
class CorruptedCrop:
    """One random crop, as view "target", and what a network sees of it, as view "image" ("image_0", "image_1", ... where there are several).

    Args:
        crop: where it comes from.
        corrupt: a function of (image, rng) that loader processes can be sent; see `corrupt`.
        versions: corrupted versions, each drawn by itself.
    """

    crop: Crop
    corrupt: Corruption
    versions: int = 1

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        target = self.crop.sample(store, case, rng)["image"]
        names = [f"image_{i}" for i in range(self.versions)] if self.versions > 1 else ["image"]
        return {"target": target} | {name: replace(target, image=self.corrupt(target.image, rng)) for name in names}
