"""Cases of other subjects, beside which a case is shown."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nnssl_ext.core.errors import UserError
from nnssl_ext.data.corrupted import Corruption
from nnssl_ext.data.loader import split_subjects
from nnssl_ext.data.views import Crop, View, read_crops
from nnssl_ext.preprocessing.store import CaseStore


@dataclass(frozen=True)
class Partners:
    """Who may stand beside a case.

    Args:
        subjects: of every case in the store.
        cases: that may be partners, of two subjects at least.
    """

    subjects: tuple[str, ...]
    cases: tuple[int, ...]

    def draw(self, case: int, rng: np.random.Generator) -> int:
        """A partner of another subject than the case's, uniform over these."""
        other = case
        while self.subjects[other] == self.subjects[case]:
            other = self.cases[int(rng.integers(len(self.cases)))]
        return other


def training_partners(store: CaseStore, seed: int, method: str, dataset: str) -> Partners:
    """The training cases as partners, of validation cases, too: few datasets hold out two subjects.

    Args:
        seed: of the split into training and validation.
        method, dataset: named in the error.

    Raises:
        UserError: all cases are of one subject.
    """
    subjects = tuple(store.subject(case) for case in range(len(store)))
    if len(set(subjects)) < 2:
        raise UserError(f"{method} needs cases of two subjects, and all are of one", dataset, "add subjects or choose another trainer")
    return Partners(subjects, tuple(split_subjects(subjects, seed)[0]))


@dataclass(frozen=True)
class MatchedPair:
    """A crop, as view "target", what a network sees of it, as view "image", and about the same place of another subject, as view "moving".

    The same place is the same share of the way through the case along each axis, as far as the crop fits in there; turned,
    zoomed and mirrored alike.

    Args:
        crop: where the first one comes from.
        corrupt: a function of (image, rng) that loader processes can be sent; see `corrupt`.
        partners: cases of the other crop.
    """

    crop: Crop
    corrupt: Corruption
    partners: Partners

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        target = self.crop.sample(store, case, rng)["image"]
        moving = at_same_place(store, case, target, self.partners, rng)
        return {"target": target, "image": replace(target, image=self.corrupt(target.image, rng)), "moving": moving}


def at_same_place(store: CaseStore, case: int, view: View, partners: Partners, rng: np.random.Generator) -> View:
    """About the same place of another subject as a view of a case, turned, zoomed and mirrored alike."""
    other, size = partners.draw(case, rng), view.image.shape[1:]
    affine = same_place(view.affine, size, store.shape(case), store.shape(other))
    return View(read_crops(store, other, [affine], [size])[0], affine, case=other)


def same_place(affine: np.ndarray, size: tuple[int, ...], shape: tuple[int, ...], other: tuple[int, ...]) -> np.ndarray:
    """The affine (3, 4) of a crop at the same place of another case; a slice stays one.

    Args:
        affine: of the crop in its own case.
        size: voxels of the crop, (z, y, x).
        shape, other: voxels of its own case and of the other one, (z, y, x).
    """
    reach = np.abs(affine[:, :3]) @ (np.array(size) - 1) / 2  # voxels of the case from the crop's centre to its sides
    centre = affine[:, :3] @ ((np.array(size) - 1) / 2) + affine[:, 3]
    middle = (np.array(other) - 1) / 2
    wanted = (centre + 0.5) / shape * other - 0.5
    found = np.clip(wanted, np.minimum(reach, middle), np.maximum(2 * middle - reach, middle))
    return np.column_stack((affine[:, :3], affine[:, 3] + np.round(found - centre)))
