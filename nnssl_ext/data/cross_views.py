"""Two views of one place, of which the first is mostly hidden."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.data.augment import Chance, Intensity
from nnssl_ext.data.masking import block_grid, random_blocks
from nnssl_ext.data.partners import Partners, same_place
from nnssl_ext.data.sessions import affine_between, inside, read_sessions
from nnssl_ext.data.views import Crop, View, ViewSpec, read_crops
from nnssl_ext.preprocessing.store import CaseStore

# strengths of nnU-Net; nothing that mixes hidden voxels into visible ones, as a blur does
COLOUR = Intensity(brightness=Chance(0.5, 0.75, 1.25), contrast=Chance(0.5, 0.75, 1.25), gamma=Chance(0.5, 0.7, 1.5))


_TRIES, _ENOUGH = 8, 0.5  # crops that are drawn until this share of the other one lies within its case


class Counterparts(Protocol):
    """Which case shows the place of a crop once more, and where in it."""

    def draw(self, case: int, rng: np.random.Generator) -> int | None:
        """The other case; None where there is none."""
        ...

    def place(self, store: CaseStore, case: int, other: int, affine: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        """The affine (3, 4) of the crop in the other case, for one of `size` voxels with `affine` in its own."""
        ...

    def carry(self, store: CaseStore, case: int, other: int) -> np.ndarray:
        """The affine (3, 4) from voxels of the other case to the voxels of `case` that show the same place."""
        ...


@dataclass(frozen=True)
class OtherSubjects:
    """Another subject's case, in which the same place is the same share of the way through along each axis."""

    partners: Partners

    def draw(self, case: int, rng: np.random.Generator) -> int | None:
        return self.partners.draw(case, rng)

    def place(self, store: CaseStore, case: int, other: int, affine: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        return same_place(affine, size, store.shape(case), store.shape(other))

    def carry(self, store: CaseStore, case: int, other: int) -> np.ndarray:
        scale = np.divide(store.shape(case), store.shape(other))
        return np.column_stack((np.diag(scale), 0.5 * scale - 0.5))


@dataclass(frozen=True)
class SameWorld:
    """Another case of the same subject, in which the same place has the same coordinates of the world.

    Args:
        others: of every case in the store, those that show about what it shows.
        geometries: of every case.
    """

    others: tuple[tuple[int, ...], ...]
    geometries: tuple[Geometry, ...]

    def draw(self, case: int, rng: np.random.Generator) -> int | None:
        return self.others[case][int(rng.integers(len(self.others[case])))] if self.others[case] else None

    def place(self, store: CaseStore, case: int, other: int, affine: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        return affine_between(affine, size, self.geometries[case], self.geometries[other])

    def carry(self, store: CaseStore, case: int, other: int) -> np.ndarray:
        return affine_between(np.eye(3, 4), store.shape(other), self.geometries[other], self.geometries[case])


def other_sessions(store: CaseStore, method: str, dataset: str) -> SameWorld:
    """Follow-up scans; arguments and errors as of `Sessions.check_follow_ups`."""
    sessions = read_sessions(store)
    sessions.check_follow_ups(method, dataset)
    return SameWorld(tuple(tuple(sessions.follow_ups(case)) for case in range(len(store))), sessions.geometries)


def other_modalities(store: CaseStore, method: str, dataset: str) -> SameWorld:
    """Registered cases of the same visit in other modalities; arguments as of `Sessions.check_pairs`.

    Raises:
        UserError: there are none, or only channels of the same case: one encoder reads all channels at once.
    """
    sessions = read_sessions(store)
    sessions.check_pairs(method, dataset)
    images = [[image for images in sessions.images(case).values() for image in images] for case in range(len(store))]
    others = tuple(tuple(sorted({image.case for image in found} - {case})) for case, found in enumerate(images))
    if not any(others):
        raise UserError(f"{method} needs modalities as cases of their own, and they are channels of one case", dataset, "list each image as a case of its own")
    return SameWorld(others, sessions.geometries)


@dataclass(frozen=True)
class CounterpartPair:
    """A random crop, as view "first", and one of the same place in another case, as view "second", mirrored alike.

    Args:
        crop: the first one.
        counterparts: where the second one comes from.
        alone: the views of a case without counterpart.
    """

    crop: Crop
    counterparts: Counterparts
    alone: ViewSpec

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        other, size = self.counterparts.draw(case, rng), self.crop.patch_size
        if other is None:
            return self.alone.sample(store, case, rng)
        for _ in range(_TRIES):
            first = self.crop.sample(store, case, rng)["image"]
            affine = self.counterparts.place(store, case, other, first.affine, size)
            if inside(affine, size, store.shape(other)) >= _ENOUGH:
                break
        image = read_crops(store, other, [affine], [size])[0]
        return {"first": first, "second": View(image, affine, intensity=self.crop.intensity.draw(len(image), rng), case=other)}


@dataclass(frozen=True)
class HiddenFirst:
    """A pair of views, "first" and "second", of which the first has `ratio` of its tokens hidden.

    Args:
        pair: the views; crops of equal size.
        token: voxels of a token, (z, y, x).
        ratio: share of the tokens to hide, in (0, 1).
    """

    pair: ViewSpec
    token: tuple[int, ...]
    ratio: float

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        views = self.pair.sample(store, case, rng)
        grid = block_grid(views["first"].image.shape[1:], self.token)
        return {**views, "first": replace(views["first"], mask=random_blocks(grid, self.ratio, rng))}
