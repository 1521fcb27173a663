"""The page of nnssl_verify: what a dataset consists of, what is wrong with it, and what it looks like."""

from __future__ import annotations

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imsave

from nnssl_ext.io.index import Case
from nnssl_ext.io.page import write_page
from nnssl_ext.io.readers import KINDS, read_volume
from nnssl_ext.planners.fingerprint import Examination, pooled_samples
from nnssl_ext.preprocessing.parallel import Workers, run_all

MOST_PICTURES = 36
MOST_LISTED = 100  # cases of one kind, and groups of duplicates; all are in integrity.json
PIXELS = 150  # edge of a slice's tile
BINS = 24
FEW_VALUES = 12  # distinct ones that get a bar each
CT_WINDOW = (-160.0, 240.0)  # HU
PERCENTILES = (0.5, 5, 25, 50, 75, 95, 99.5)


@dataclass(frozen=True)
class Kind:
    """All findings of one kind: name and sentence of each case."""

    kind: str
    quarantined: bool
    fix: str
    cases: list[tuple[str, str]]


@dataclass(frozen=True)
class Chart:
    """A histogram: relative height and tooltip of each bar, labels at the ends."""

    title: str
    bars: list[tuple[float, str]]
    first: str
    last: str


def by_kind(found: Examination) -> list[Kind]:
    """Findings grouped by kind: those that quarantine first, then the frequent ones."""
    cases: dict[tuple[bool, str], list[tuple[str, str]]] = defaultdict(list)
    fixes = {}
    for name, findings in found.findings.items():
        for finding in findings:
            cases[name in found.failed, finding.kind].append((name, finding.sentence))
            fixes[finding.kind] = finding.fix
    ordered = sorted(cases.items(), key=lambda item: (not item[0][0], -len(item[1]), item[0][1]))
    return [Kind(kind, failed, fixes[kind], entries) for (failed, kind), entries in ordered]


def write_integrity_page(path: Path, found: Examination, workers: Workers, header_only: bool = False) -> None:
    """Write the page of an examination.

    Args:
        path: HTML file.
        found: what was found.
        workers: who reads the volumes of which pictures are shown.
        header_only: no voxel was read; no picture is shown.
    """
    kinds, counts = by_kind(found), found.counts()
    shown = [] if header_only else shown_cases(found, kinds)
    note = "Only headers were read. Not checked: damaged or missing voxels, intensities, body, duplicates." if header_only else ""
    write_page(
        path,
        f"Integrity of {found.dataset_name}",
        f"{len(found.findings):,} cases: {counts['ok']:,} ok, {counts['warning']:,} with warnings, {counts['quarantined']:,} quarantined.",
        [],
        note,
        "integrity.html",
        counts=counts,
        tiles=_tiles(found),
        steps=_steps(found, header_only),
        kinds=kinds,
        meanings=KINDS,
        most_listed=MOST_LISTED,
        duplicates=_duplicates(found),
        pictures=_pictures(found, shown, workers),
        suspicious=len(_suspicious(found)),
        geometry=_geometry_charts(found),
        modalities=_modality_rows(found),
        intensities=_intensities(found),
        percentiles=PERCENTILES,
        header_only=header_only,
    )


def shown_cases(found: Examination, kinds: Sequence[Kind]) -> list[str]:
    """Suspicious cases to be pictured: the first of each kind, then the second ones, and so on."""
    queues = [[name for name, _ in kind.cases] for kind in kinds if not kind.quarantined]
    turns = [queue[turn] for turn in range(MOST_PICTURES) for queue in queues if turn < len(queue)]
    return list(dict.fromkeys(turns))[:MOST_PICTURES]


def _suspicious(found: Examination) -> list[str]:
    return [name for name in found.described if found.findings[name]]


def _tiles(found: Examination) -> list[tuple[str, str]]:
    cases = found.described.values()
    volume = sum(float(np.prod(case["shape"], dtype=float)) * len(case["modalities"]) for case in cases)
    return [
        ("cases", f"{len(found.findings):,}"),
        ("subjects", f"{len({case.subject for case in found.cases}):,}"),
        ("size of the files", _bytes(sum(case["file_bytes"] for case in cases))),
        ("voxels", f"{volume / 1e9:.3g} billion" if volume >= 1e9 else f"{volume / 1e6:.3g} million"),
    ]


def _steps(found: Examination, header_only: bool) -> list[str]:
    number = found.dataset_name.removeprefix("Dataset").partition("_")[0]
    counts = found.counts()
    steps = []
    if counts["quarantined"]:
        steps.append(f"{counts['quarantined']:,} cases can't be read. They are in no fingerprint and are not preprocessed; mend them or leave them out.")
    if counts["warning"]:
        steps.append(f"{counts['warning']:,} cases are used although something about them is unusual. Look at them below; take out what should not be there.")
    if steps:
        steps.append(f"Run nnssl_verify -d {number} again afterwards" + ("." if header_only else ": only files that are new, changed or quarantined are read."))
    if header_only:
        steps.append(f"nnssl_verify -d {number} reads the voxels, too, and writes the fingerprint.")
    elif found.described:
        steps.append(f"nnssl_plan_experiment -d {number}, then nnssl_preprocess -d {number}; or nnssl_plan_and_preprocess -d {number} for both.")
    return steps


def _duplicates(found: Examination) -> list[list[tuple[str, str]]]:
    """Groups of cases (name, subject) that share the voxels of a channel."""
    places: dict[str, list[str]] = defaultdict(list)
    for name, hashes in found.sha256.items():
        for content in dict.fromkeys(hashes):
            places[content].append(name)
    groups = dict.fromkeys(tuple(names) for names in places.values() if len(names) > 1)
    return [[(name, found.described[name]["subject"]) for name in names] for names in groups]


def _geometry_charts(found: Examination) -> list[tuple[str, list[Chart]]]:
    cases = list(found.described.values())
    if not cases:
        return []
    rows = []
    for title, key in (("Spacing (mm)", "spacing"), ("Shape (voxels)", "shape")):
        values = np.array([case[key] for case in cases], float)
        rows.append((title, [histogram(values[:, axis], name) for axis, name in enumerate(("first axis (z)", "second axis (y)", "third axis (x)"))]))
    return rows


def histogram(values: np.ndarray, title: str) -> Chart:
    """Of positive numbers; a bar each for few distinct ones, else equal bins, of the logarithm where they span more than a factor of ten."""
    values = np.array([float(f"{value:.3g}") for value in values])
    distinct, numbers = np.unique(values, return_counts=True)
    if len(distinct) <= FEW_VALUES:
        labels = [f"{value:g}" for value in distinct]
    else:
        low, high = distinct[0], distinct[-1]
        edges = np.geomspace(low, high, BINS + 1) if high > 10 * low else np.linspace(low, high, BINS + 1)
        edges[0], edges[-1] = low, high
        numbers = np.histogram(values, edges)[0]
        labels = [f"{a:.3g} to {b:.3g}" for a, b in zip(edges, edges[1:])]
    bars = [(float(number / numbers.max()), f"{label}: {number:,} cases") for number, label in zip(numbers, labels)]
    return Chart(title, bars, f"{distinct[0]:g}", f"{distinct[-1]:g}" if len(distinct) > 1 else "")


def _modality_rows(found: Examination) -> list[tuple[str, int]]:
    return Counter(" + ".join(case["modalities"]) for case in found.described.values()).most_common()


def _intensities(found: Examination) -> list[dict[str, Any]]:
    """By modality: percentiles of the body and the outline of their histogram, as points of a polygon 100 wide and 40 high."""
    rows = []
    for modality, values in pooled_samples(found).items():
        ranks = np.percentile(values.astype(np.float64), PERCENTILES)
        low, high = float(ranks[0]), float(ranks[-1])
        numbers, edges = np.histogram(values, 60, (low, high if high > low else low + 1))
        tops = [f"{100 * index / 60:.2f},{40 - 40 * number / numbers.max():.2f}" for corner, number in enumerate(numbers) for index in (corner, corner + 1)]
        rows.append({"modality": modality, "voxels": len(values), "ranks": [f"{value:.4g}" for value in ranks], "outline": " ".join(["0,40", *tops, "100,40"])})
    return rows


def _pictures(found: Examination, names: Sequence[str], workers: Workers) -> list[dict[str, Any]]:
    if not names:
        return []
    cases = {case.identifier: case for case in found.cases}
    made = run_all(picture, [cases[name] for name in names], names, workers, "pictures of suspicious cases")[0]
    sentences = {name: [f"{finding.kind}: {finding.sentence}" for finding in found.findings[name]] for name in names}
    return [{"name": name, "png": made[name], "sentences": sentences[name], "modality": cases[name].modalities[0]} for name in names if name in made]


def picture(case: Case) -> str:
    """The middle axial, coronal and sagittal slice of a case's first channel side by side, as PNG in base64."""
    volume, geometry = read_volume(case.images[0])
    low, high = window(volume, case.modalities[0])
    z, y, x = (n // 2 for n in volume.shape)
    upright = slice(None, None, -1 if geometry.direction[8] > 0 else 1)  # the head above
    sz, sy, sx = geometry.spacing
    planes = ((volume[z], (sy, sx)), (volume[upright, y], (sz, sx)), (volume[upright, :, x], (sz, sy)))
    tiles = np.zeros((PIXELS, 3 * PIXELS), np.float32)
    for number, (plane, spacing) in enumerate(planes):
        grey = np.clip((_fitted(plane, spacing) - low) / (high - low), 0, 1)
        top, left = (PIXELS - grey.shape[0]) // 2, number * PIXELS + (PIXELS - grey.shape[1]) // 2
        tiles[top : top + grey.shape[0], left : left + grey.shape[1]] = grey
    buffer = io.BytesIO()
    imsave(buffer, tiles, cmap="gray", vmin=0, vmax=1, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def window(volume: np.ndarray, modality: str) -> tuple[float, float]:
    """Values shown black and white: soft tissue for a CT in HU, else the 1st to 99th percentile."""
    values = volume[:: max(1, volume.shape[0] // 64)].ravel()[::7]
    low, high = (float(value) for value in np.percentile(values, (1, 99)))
    if modality.upper().startswith("CT") and low <= CT_WINDOW[0] and high > CT_WINDOW[0]:
        return CT_WINDOW
    return (low, high) if high > low else (float(volume.min()), float(volume.max()))


def _fitted(plane: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """A slice (rows, columns) on square pixels, as large as fits into a tile; nearest voxels."""
    sides = [n * mm for n, mm in zip(plane.shape, spacing)]
    pixels = [max(1, round(PIXELS * side / max(sides))) for side in sides]
    rows, columns = (np.minimum(((np.arange(p) + 0.5) * n / p).astype(int), n - 1) for p, n in zip(pixels, plane.shape))
    return plane[np.ix_(rows, columns)]


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
