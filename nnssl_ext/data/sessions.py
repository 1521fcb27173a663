"""Which cases show the same anatomy: images of one visit in several modalities, and follow-up scans.

Images of a visit are either channels of one case, which lie on one grid, or cases of their own with the same subject and
session, each with its own stored geometry.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.data.spatial import to_case
from nnssl_ext.preprocessing.store import CaseStore

SHARED = 0.5  # of the smaller image's extent, which two registered images share at least
_POINTS = 8  # along each axis, by which an extent is measured
_AGREE = 1e-2  # voxels by which grids that agree may be apart anywhere in a crop


@dataclass(frozen=True)
class Image:
    """An image of one modality: a channel of a case of the store."""

    case: int
    channel: int


@dataclass(frozen=True)
class Sessions:
    """What the cases of a store have to do with each other.

    Two images count as registered where at least half of the smaller one's extent in the world (mm) lies within the other's:
    that of the stored arrays, which were cropped to the body. Whether the anatomy in there agrees, too, cannot be known from
    a header: coordinates of two scanners have nothing in common unless somebody registered their images.

    Args:
        identifiers, subjects, sessions: of every case in the store.
        modalities: names of its channels.
        geometries: of its stored array.
    """

    identifiers: tuple[str, ...]
    subjects: tuple[str, ...]
    sessions: tuple[str, ...]
    modalities: tuple[tuple[str, ...], ...]
    geometries: tuple[Geometry, ...]

    @cached_property
    def visits(self) -> dict[tuple[str, str], list[int]]:
        """Cases by subject and session."""
        found: dict[tuple[str, str], list[int]] = defaultdict(list)
        for case, key in enumerate(zip(self.subjects, self.sessions)):
            found[key].append(case)
        return dict(found)

    @cached_property
    def people(self) -> dict[str, list[int]]:
        """Cases by subject."""
        found: dict[str, list[int]] = defaultdict(list)
        for case, subject in enumerate(self.subjects):
            found[subject].append(case)
        return dict(found)

    def images(self, case: int) -> dict[str, list[Image]]:
        """By modality: the case's own channels, and images of the same visit in further modalities that are registered to it."""
        found = self._channels(case)
        for other in self.visits[self.subjects[case], self.sessions[case]]:
            if not set(self.modalities[other]) <= set(self.modalities[case]) and self._registered(case, other):
                for name, images in self._channels(other).items():
                    if name not in self.modalities[case]:
                        found.setdefault(name, []).extend(images)
        return found

    def follow_ups(self, case: int) -> list[int]:
        """Cases of the same subject and modalities from other sessions, as far as their extents overlap like those of registered images."""
        others = (other for other in self.people[self.subjects[case]] if self.sessions[other] != self.sessions[case])
        return [other for other in others if self.modalities[other] == self.modalities[case] and self._registered(case, other)]

    def check_pairs(self, method: str, dataset: str) -> None:
        """Raise a `UserError` unless a visit has registered images of two modalities.

        Args:
            method, dataset: named in the error.
        """
        cases = range(len(self.identifiers))
        if any(len(self.images(case)) > 1 for case in cases):
            return
        for visit in self.visits.values():
            for case in visit:
                for other in visit:
                    if self.modalities[case] != self.modalities[other]:
                        self._apart(case, other, f"{method} needs registered images of two modalities", dataset)
        what = f"{method} needs images of two modalities of one visit; none of {len(self.visits)} visits has them (first: {self._named(cases[:2])})"
        raise UserError(what, dataset, "list a visit's images under one session, or as channels of one case; or choose another trainer")

    def check_follow_ups(self, method: str, dataset: str) -> None:
        """Raise a `UserError` unless a subject has two sessions that show about the same place in the same modality; arguments as of `check_pairs`."""
        cases = range(len(self.identifiers))
        if any(self.follow_ups(case) for case in cases):
            return
        for person in self.people.values():
            for case in person:
                for other in person:
                    if self.sessions[case] != self.sessions[other] and self.modalities[case] == self.modalities[other]:
                        self._apart(case, other, f"{method} needs follow-up scans of the same place", dataset)
        what = f"{method} needs a subject's sessions in the same modality; none of {len(self.people)} subjects has two (first: {self._named(cases[:2])})"
        raise UserError(what, dataset, "list follow-up scans as sessions of one subject, or choose another trainer")

    def _apart(self, case: int, other: int, what: str, dataset: str) -> None:
        share = overlap(self.geometries[case], self.geometries[other])
        fix = f"register them, so that they share {SHARED:.0%} in world coordinates, and preprocess again; or choose another trainer"
        raise UserError(f"{what}; {self._named((case, other))} share {share:.0%} of their extent", dataset, fix)

    def _channels(self, case: int) -> dict[str, list[Image]]:
        found: dict[str, list[Image]] = {}
        for channel, name in enumerate(self.modalities[case]):
            found.setdefault(name, []).append(Image(case, channel))
        return found

    def _registered(self, case: int, other: int) -> bool:
        return overlap(self.geometries[case], self.geometries[other]) >= SHARED

    def _named(self, cases: Sequence[int]) -> str:
        return " and ".join(f"{self.identifiers[case]} ({', '.join(self.modalities[case])})" for case in cases)


def read_sessions(store: CaseStore) -> Sessions:
    """What the cases' JSON files say, each read once."""
    infos = [store.info(case) for case in range(len(store))]
    return Sessions(
        tuple(store.identifiers),
        tuple(store.subject(case) for case in range(len(store))),
        tuple(str(info["session"]) for info in infos),
        tuple(tuple(info["modalities"]) for info in infos),
        tuple(Geometry.from_dict(info["stored"]) for info in infos),
    )


def overlap(a: Geometry, b: Geometry) -> float:
    """Share of the smaller image's extent that lies within the other's, [0, 1], in steps of 1/512."""
    smaller, larger = sorted((a, b), key=lambda geometry: math.prod(geometry.shape) * math.prod(geometry.spacing))
    return inside(_map(smaller, larger), smaller.shape, larger.shape)


def inside(affine: np.ndarray, size: Sequence[int], shape: Sequence[int]) -> float:
    """Share of a crop that lies within a case, [0, 1], in steps of 1/512.

    Args:
        affine: (3, 4), from voxels of the crop to voxels of the case.
        size, shape: voxels of the crop and of the case, (z, y, x).
    """
    steps = [(np.arange(_POINTS) + 0.5) * n / _POINTS - 0.5 for n in size]
    places = to_case(affine, np.stack(np.meshgrid(*steps, indexing="ij"), -1).reshape(-1, 3))
    return float(((places >= -0.5) & (places <= np.array(shape) - 0.5)).all(1).mean())


def affine_between(affine: np.ndarray, size: Sequence[int], source: Geometry, target: Geometry) -> np.ndarray:
    """The affine (3, 4) of the same place of the world in another case, which `views.read_crops` reads.

    Grids that agree to a hundredth of a voxel within the crop count as equal but for a shift by whole voxels, so that what
    was sliced from one case is sliced from the other.

    Args:
        affine: of a crop in its own case, (3, 4).
        size: voxels of the crop, (z, y, x).
        source, target: geometries of its own case and of the other one.
    """
    carry = _map(source, target)
    corners = to_case(affine, np.stack(np.meshgrid(*((0, n - 1) for n in size), indexing="ij"), -1).reshape(-1, 3))
    if np.abs(to_case(carry - np.rint(carry), corners)).max() < _AGREE:
        carry = np.rint(carry)
    return np.column_stack((carry[:, :3] @ affine[:, :3], carry[:, :3] @ affine[:, 3] + carry[:, 3]))


def _map(source: Geometry, target: Geometry) -> np.ndarray:
    """From voxels (z, y, x) of one geometry to voxels of another, (3, 4)."""
    (first, start), (second, end) = (_world(geometry) for geometry in (source, target))
    return np.linalg.solve(second, np.column_stack((first, start - end)))


def _world(geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (3, 3) from voxels (z, y, x) to the world (x, y, z) in mm, and where the first voxel is."""
    columns = np.reshape(geometry.direction, (3, 3)) * geometry.spacing[::-1]
    return columns[:, ::-1], np.asarray(geometry.origin, float)
