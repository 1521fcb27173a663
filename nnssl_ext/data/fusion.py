"""Crops of two subjects, and how much of the one is mixed into the other where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnssl_ext.data.partners import Partners
from nnssl_ext.data.views import Crop, View
from nnssl_ext.preprocessing.store import CaseStore

BOXES = (10, 39)  # number of boxes, uniform (Wang et al. 2023)
SHORTEST, LONGEST = 8, 0.625  # edge of a box: from so many voxels to this share of the crop's, uniform (as in public code)


def random_classes(size: Sequence[int], classes: int, rng: np.random.Generator) -> np.ndarray:
    """Random boxes, each with a class of 1 to classes - 1, later ones over earlier ones; 0 outside: (z, y, x) float32."""
    longest = [max(1, int(LONGEST * n)) for n in size]
    count = rng.integers(BOXES[0], BOXES[1] + 1)
    edges = rng.integers([min(SHORTEST, n) for n in longest], np.array(longest) + 1, (count, 3))
    starts = rng.integers(0, np.array(size) - edges + 1)
    label = np.zeros(tuple(size), np.float32)
    for start, edge, number in zip(starts.tolist(), edges.tolist(), rng.integers(1, classes, count).tolist()):
        label[tuple(slice(first, first + length) for first, length in zip(start, edge))] = number
    return label


@dataclass(frozen=True)
class FusionPair:
    """Views "foreground", a crop of the case, "background", one of another subject, and "label", a class for each voxel.

    Args:
        crop: where both come from.
        partners: cases that the background may come from.
        classes: number of classes, two or more.
    """

    crop: Crop
    partners: Partners
    classes: int

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        other = self.partners.draw(case, rng)
        foreground, background = (self.crop.sample(store, number, rng)["image"] for number in (case, other))
        label = View(random_classes(self.crop.patch_size, self.classes, rng)[None], foreground.affine)
        return {"foreground": foreground, "background": replace(background, case=other), "label": label}
