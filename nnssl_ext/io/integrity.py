"""The verdict on an image: what is suspicious about one that can be read, alone and beside the others."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnssl_ext.core.geometry import Geometry

OK, WARNING, QUARANTINED = "ok", "warning", "quarantined"

FEWEST_SLICES = 8  # along every axis
FEWEST_VOXELS = 10_000
MOST_VOXELS = 500_000_000  # 2 GB as float32
MOST_ANISOTROPY = 20.0  # largest through smallest spacing
SHORTEST_MM, LONGEST_MM = 20.0, 3000.0  # of an image's longest side
HIGHEST_AIR_HU = -200.0  # a CT's lowest value, were there any air
EIGHT_BIT = 255
NORMALISED_RANGE = 20.0  # HU; a CT's values span thousands
LEAST_BODY = 0.01  # share of the voxels
MOST_LABELS = 32  # distinct whole numbers
NEGATIVE_DEPTH = 0.05  # through the 99.5th percentile of the magnitudes; noise and ringing around 0 are less
MOST_NEGATIVE = 0.1  # share of an MR's voxels
MOST_AT_MAXIMUM = 0.02  # share of the body
MOST_SPIKE = 20.0  # maximum through the body's 99.5th percentile
ENOUGH_VOXELS = 1000  # of the body, to judge shares
ENOUGH_CASES = 10  # of equal modalities, to call one unusual
UNUSUAL_Z = 6.0  # robust standard deviations
LEAST_SPREAD = 0.1  # robust standard deviation of a logarithm: 10 %
RARE = 0.05  # share of the cases; more of them are a group of their own, not outliers
LOOKED_AT = 500_000  # voxels on a regular grid that shares are counted on

MR_NAMES = ("MR", "T1", "T2", "FLAIR", "PD", "DWI")  # beginnings of modalities whose values are magnitudes

FIXES: dict[str, str] = {
    "anisotropy": "check the spacing in the header; if it is right, nothing needs to be done",
    "bodyless": "look at the image; take it out if there is nothing on it",
    "extent": "check the unit of the spacing in the header (it must be mm)",
    "hu": "convert it again with the rescale slope and intercept applied, or name another modality than CT",
    "huge": "make sure that the machine has the memory (-np 1), or cut the image into parts",
    "labels": "make sure that it is an image and no segmentation",
    "leak": "take all but one out of the index, or give them one subject: else a validation case is trained on",
    "negative": "check the modality; use the image as it came from the scanner, not a normalised one",
    "saturated": "use the image before it was clipped",
    "spikes": "clip the image, or repair its wrong voxels",
    "thin": "make sure that no slices are missing; take localisers out",
    "tiny": "take it out if it is a localiser or a part of an image",
    "twin": "take all but one out of the index",
    "unusual_orientation": "check the header; reorient the image to that of the others",
    "unusual_shape": "look at the image; it may be a localiser, a part, or another protocol",
    "unusual_spacing": "check the spacing in the header; it may be wrong, or the image from another protocol",
}
"""All kinds of findings about images that can be read, and what to do about each."""


@dataclass(frozen=True)
class Finding:
    """Something about a case that a user should know.

    Args:
        kind: one word; a key of `FIXES`, or of `nnssl_ext.io.readers.KINDS`.
        sentence: what was found, with the figures.
        fix: what to do about it.
    """

    kind: str
    sentence: str
    fix: str

    def as_dict(self) -> dict[str, str]:
        return {"kind": self.kind, "sentence": self.sentence, "fix": self.fix}


@dataclass(frozen=True)
class Look:
    """What is judged of a volume.

    Args:
        modality: its name.
        low, high: smallest and largest value of all.
        values: voxels on a regular grid, flat.
        body: those of them in the body.
        body_share: share of the voxels that are body.
    """

    modality: str
    low: float
    high: float
    values: np.ndarray
    body: np.ndarray
    body_share: float

    @staticmethod
    def at(volume: np.ndarray, body: np.ndarray, modality: str) -> Look:
        """Look at a volume (z, y, x) whose body mask (z, y, x) is known."""
        step = max(1, int(np.ceil((volume.size / LOOKED_AT) ** (1 / 3))))
        grid = (slice(None, None, step),) * 3
        return Look(modality.upper(), float(volume.min()), float(volume.max()), volume[grid].ravel(), volume[grid][body[grid]], float(body.mean()))

    @property
    def is_ct(self) -> bool:
        return self.modality.startswith("CT")


def content_hash(volume: np.ndarray) -> str:
    """SHA-256 of shape and voxels: equal for one image in several formats, compressions and integer types."""
    digest = hashlib.sha256(repr(tuple(int(n) for n in volume.shape)).encode())
    digest.update(np.ascontiguousarray(volume, "<f4").data)
    return digest.hexdigest()


def volume_findings(look: Look) -> list[Finding]:
    """What is suspicious about the voxels of one channel."""
    if what := labels(look):
        return [_finding("labels", what)]  # all else follows from that
    return [_finding(kind, what) for kind, check in _VOLUME_CHECKS.items() if (what := check(look))]


def geometry_findings(geometry: Geometry) -> list[Finding]:
    """What is suspicious about size and spacing; no voxels needed."""
    return [_finding(kind, what) for kind, check in _GEOMETRY_CHECKS.items() if (what := check(geometry))]


def labels(look: Look) -> str:
    """Few distinct whole numbers."""
    if len(np.unique(look.values[:: max(1, len(look.values) // 5000)])) > MOST_LABELS:
        return ""
    distinct = np.unique(look.values)
    few = len(distinct) <= MOST_LABELS and bool((distinct == np.round(distinct)).all())
    return f"only {len(distinct)} distinct values, all whole numbers from {look.low:g} to {look.high:g}" if few else ""


def not_hounsfield(look: Look) -> str:
    """A CT without air: its values are shifted, windowed or normalised."""
    if not look.is_ct or look.low <= HIGHEST_AIR_HU:
        return ""
    span = f"the values of a CT from {look.low:.4g} to {look.high:.4g}"
    if look.high - look.low <= NORMALISED_RANGE:
        return f"{span}: normalised, not in HU"
    if look.low >= 0:
        return f"{span}: 8-bit grey values, not HU" if look.high <= EIGHT_BIT else f"{span}: the rescale intercept seems not to be applied"
    return f"{span}: no air at all"


def empty(look: Look) -> str:
    """Hardly any body."""
    return f"the body takes {look.body_share:.2%} of the volume" if look.body_share < LEAST_BODY else ""


def negative(look: Look) -> str:
    """An MR image with negative values in bulk."""
    share = float(np.mean(look.values < -NEGATIVE_DEPTH * float(np.percentile(np.abs(look.values), 99.5))))
    return f"{share:.0%} of the voxels of an MR image are negative" if look.modality.startswith(MR_NAMES) and share >= MOST_NEGATIVE else ""


def saturated(look: Look) -> str:
    """Many voxels at the largest value."""
    if len(look.body) < ENOUGH_VOXELS:
        return ""
    share = float(np.mean(look.body == np.float32(look.high)))
    return f"{share:.0%} of the body has the largest value, {look.high:g}" if share >= MOST_AT_MAXIMUM else ""


def spikes(look: Look) -> str:
    """Single voxels far above all others; a CT's are clipped anyway."""
    if look.is_ct or len(look.body) < ENOUGH_VOXELS:
        return ""
    usual = float(np.percentile(look.body, 99.5))
    far = usual > 0 and look.high > MOST_SPIKE * usual
    return f"the largest value, {look.high:.4g}, is {look.high / usual:.0f} times the 99.5th percentile of the body, {usual:.4g}" if far else ""


def thin(geometry: Geometry) -> str:
    """Few slices."""
    return f"only {min(geometry.shape)} slices along one axis ({size(geometry.shape)} voxels)" if min(geometry.shape) < FEWEST_SLICES else ""


def tiny(geometry: Geometry) -> str:
    """Few voxels."""
    small = np.prod(geometry.shape, dtype=float) < FEWEST_VOXELS and min(geometry.shape) >= FEWEST_SLICES
    return f"only {size(geometry.shape)} voxels" if small else ""


def huge(geometry: Geometry) -> str:
    """Many voxels."""
    voxels = np.prod(geometry.shape, dtype=float)
    return f"{size(geometry.shape)} voxels, {voxels * 4 / 2**30:.1f} GiB in memory" if voxels > MOST_VOXELS else ""


def anisotropic(geometry: Geometry) -> str:
    """Much longer voxels than wide."""
    ratio = max(geometry.spacing) / min(geometry.spacing)
    return f"voxels of {size(geometry.spacing)} mm, {ratio:.0f} times as long as wide" if ratio > MOST_ANISOTROPY else ""


def odd_extent(geometry: Geometry) -> str:
    """No part of a body is so small or so large."""
    longest = max(n * mm for n, mm in zip(geometry.shape, geometry.spacing))
    return f"the image's longest side measures {longest:.4g} mm" if not SHORTEST_MM <= longest <= LONGEST_MM else ""


_VOLUME_CHECKS: dict[str, Callable[[Look], str]] = {"hu": not_hounsfield, "bodyless": empty, "negative": negative, "saturated": saturated, "spikes": spikes}
_GEOMETRY_CHECKS: dict[str, Callable[[Geometry], str]] = {"thin": thin, "tiny": tiny, "huge": huge, "anisotropy": anisotropic, "extent": odd_extent}


def collection_findings(cases: Mapping[str, Mapping[str, Any]], hashes: Mapping[str, Sequence[str]]) -> dict[str, list[Finding]]:
    """What is suspicious about cases beside the others.

    Args:
        cases: `subject`, `modalities`, `shape`, `spacing` and `direction` of each case.
        hashes: `content_hash` of each channel of each case; empty where voxels weren't read.

    Returns:
        findings by case; cases without any are left out.
    """
    found: dict[str, list[Finding]] = defaultdict(list)
    for name, finding in [*_duplicates(cases, hashes), *_unusual(cases)]:
        found[name].append(finding)
    return dict(found)


def _duplicates(cases: Mapping[str, Mapping[str, Any]], hashes: Mapping[str, Sequence[str]]) -> list[tuple[str, Finding]]:
    places = defaultdict(list)
    for name in sorted(hashes):
        for channel, content in enumerate(hashes[name]):
            places[content].append((name, channel))
    found: list[tuple[str, Finding]] = []
    for group in (group for group in places.values() if len(group) > 1):
        members = list(dict.fromkeys(name for name, _ in group))
        for name in members:
            channels = [str(channel) for other, channel in group if other == name]
            if len(channels) > 1:
                found.append((name, _finding("twin", f"channels {', '.join(channels)} hold the same voxels")))
        if len(members) > 1:
            subjects = {cases[name]["subject"] for name in members}
            kind, of = ("leak", f", under {len(subjects)} subjects") if len(subjects) > 1 else ("twin", ", of the same subject")
            found += [
                (name, _finding(kind, f"holds the same voxels as {_some([other for other in members[:5] if other != name], len(members) - 1)}{of}"))
                for name in members
            ]
    return found


def _unusual(cases: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Finding]]:
    groups = defaultdict(list)
    for name in sorted(cases):
        groups[tuple(cases[name]["modalities"])].append(name)
    found: list[tuple[str, Finding]] = []
    for modalities, names in groups.items():
        if len(names) < ENOUGH_CASES:
            continue
        others = f"of the {len(names)} {'+'.join(modalities)} cases"
        for kind, key, unit in (("unusual_spacing", "spacing", "mm"), ("unusual_shape", "shape", "voxels")):
            values = np.array([cases[name][key] for name in names], float)
            usual = size(np.median(values, axis=0))
            for index in outliers(values):
                found.append((names[index], _finding(kind, f"{size(values[index])} {unit}; the median {others} is {usual} {unit}")))
        codes = [orientation(cases[name]["direction"]) for name in names]
        usual, count = Counter(codes).most_common(1)[0]
        if len(names) - count <= _most_outliers(len(names)):
            found += [
                (name, _finding("unusual_orientation", f"stored as {code}, {count} {others} as {usual}")) for name, code in zip(names, codes) if code != usual
            ]
    return found


def outliers(values: np.ndarray) -> list[int]:
    """Rows of positive numbers (N, axes) that lie far from the others on a logarithmic scale: robust z from median and MAD.

    Nothing where more than a small share does: that is a group of its own.
    """
    logs = np.log(values)
    distance = np.abs(logs - np.median(logs, axis=0))
    spread = np.maximum(1.4826 * np.median(distance, axis=0), LEAST_SPREAD)
    far = np.flatnonzero((distance > UNUSUAL_Z * spread).any(axis=1))
    return [int(index) for index in far] if len(far) <= _most_outliers(len(values)) else []


def _most_outliers(cases: int) -> int:
    return max(1, int(RARE * cases))


def orientation(direction: Sequence[float]) -> str:
    """Where the x, y and z axes of an image point to, such as "LPS", from its 9 direction cosines (LPS world)."""
    axes = np.reshape(direction, (3, 3)).T
    letters = (("R", "L"), ("A", "P"), ("I", "S"))
    return "".join(letters[int(np.abs(axis).argmax())][int(axis[np.abs(axis).argmax()] > 0)] for axis in axes)


def verdict_of(findings: Sequence[Finding], quarantined: bool = False) -> str:
    return QUARANTINED if quarantined else WARNING if findings else OK


def size(values: Sequence[float] | np.ndarray) -> str:
    return " × ".join(f"{value:.4g}" for value in values)


def _some(names: Sequence[str], count: int) -> str:
    shown = list(names)[:3]
    return ", ".join(shown) + (f" and {count - len(shown)} more" if count > len(shown) else "")


def _finding(kind: str, sentence: str) -> Finding:
    return Finding(kind, sentence, FIXES[kind])
