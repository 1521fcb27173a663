"""Predicted label maps against a reference: hard Dice, NSD and HD95 of every case and label, and what the cases say about two methods.

A label that neither map holds has no figure (NaN) and is left out of all means; one that only one of them holds has Dice and NSD 0 and no HD95 (NaN).
A case's figure is the mean over its labels, the dataset's the mean over its cases. Two methods are compared where both have a figure: label by label,
then case by case, so that neither is judged on other organs than the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.evaluation.statistics import Estimate, bootstrap_mean, paired_difference
from nnssl_ext.evaluation.surface_distances import SurfaceDistances
from nnssl_ext.io.case import ENDINGS, stem
from nnssl_ext.io.readers import read_volume
from nnssl_ext.preprocessing.preprocessor import same_grid

METRICS = ("dice", "nsd", "hd95")
Figures = dict[tuple[str, int], dict[str, float]]  # of each case and label


@dataclass(frozen=True)
class Comparison:
    """One metric of one label (None: the mean of each case over its labels).

    Args:
        ours: mean over cases.
        base, gain: of the method compared with, and the paired difference; None without one.
    """

    metric: str
    label: int | None
    ours: Estimate
    base: Estimate | None = None
    gain: Estimate | None = None


def segmentation_metrics(
    predicted: np.ndarray, known: np.ndarray, spacing: Sequence[float], labels: Sequence[int], tolerance: float
) -> dict[int, dict[str, float]]:
    """ "dice", "nsd" and "hd95" (mm) of each label.

    Args:
        predicted, known: integer labels (z, y, x).
        spacing: mm, (z, y, x).
        labels: which to judge.
        tolerance: of the NSD, mm.
    """
    return {label: _figures(predicted == label, known == label, spacing, tolerance) for label in labels}


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Dice coefficient of two masks; NaN where both are empty."""
    sizes = int(first.sum()) + int(second.sum())
    return 2 * int((first & second).sum()) / sizes if sizes else math.nan


def _figures(predicted: np.ndarray, known: np.ndarray, spacing: Sequence[float], tolerance: float) -> dict[str, float]:
    overlap = dice(predicted, known)
    if math.isnan(overlap):
        return dict.fromkeys(METRICS, math.nan)
    if not (predicted.any() and known.any()):
        return {"dice": overlap, "nsd": 0.0, "hd95": math.nan}
    apart = SurfaceDistances.between(predicted, known, spacing)
    return {"dice": overlap, "nsd": apart.nsd(tolerance), "hd95": apart.hd95()}


def evaluate(predictions: Sequence[Path], reference: Path, tolerance: float) -> list[Figures]:
    """Figures of each folder of predictions, for every case of the reference and every foreground label that occurs in any of them.

    Args:
        predictions: folders of label maps, named as those of the reference.
        reference: folder of the true ones.
        tolerance: of the NSD, mm.

    Raises:
        UserError: a case of the reference without a prediction, another grid, no label maps, no foreground.
    """
    cases = _label_maps(reference)
    files = [_matching(folder, cases, reference) for folder in predictions]
    results: list[Figures] = [{} for _ in predictions]
    for case, path in cases.items():
        known, geometry = read_labels(path)
        maps = [_on_grid(found[case], geometry) for found in files]
        labels = np.unique([label for array in (known, *maps) for label in np.unique(array)])
        for result, predicted in zip(results, maps):
            found = segmentation_metrics(predicted, known, geometry.spacing, [int(label) for label in labels if label > 0], tolerance)
            result |= {(case, label): figures for label, figures in found.items()}
    everywhere = sorted({label for _, label in results[0]})
    if not everywhere:
        raise UserError("the label maps hold no foreground", reference, "give folders of label maps")
    absent = dict.fromkeys(METRICS, math.nan)
    return [{(case, label): result.get((case, label), absent) for case in cases for label in everywhere} for result in results]


def _on_grid(path: Path, geometry: Geometry) -> np.ndarray:
    labels, other = read_labels(path)
    if not same_grid(geometry, other):
        raise UserError("the prediction isn't on the grid of the reference", path, "predict again, or resample it (nearest neighbour)")
    return labels


def read_labels(path: Path) -> tuple[np.ndarray, Geometry]:
    """A label map as int32 (z, y, x).

    Raises:
        UserError: unreadable, or its values are no whole numbers of at least 0.
    """
    array, geometry = read_volume(path, constant=True)
    labels = array.astype(np.int32)
    if (labels != array).any() or labels.min() < 0:
        raise UserError("the file is no label map: it holds values that are no whole numbers of at least 0", path, "give label maps, not probabilities")
    return labels, geometry


def compare(ours: Figures, base: Figures | None = None, seed: int = 0) -> list[Comparison]:
    """Of every metric, the mean over labels and each label by itself."""
    labels = sorted({label for _, label in ours})
    return [_compared(ours, base, metric, label, labels, seed) for metric in METRICS for label in (None, *labels)]


def _compared(ours: Figures, base: Figures | None, metric: str, label: int | None, labels: Sequence[int], seed: int) -> Comparison:
    chosen = labels if label is None else [label]
    if base is None:
        return Comparison(metric, label, bootstrap_mean(list(case_means(ours, metric, chosen).values()), seed))
    common = {key for key in ours if key in base and math.isfinite(ours[key][metric]) and math.isfinite(base[key][metric])}
    one, other = (case_means({key: figures[key] for key in ours if key in common}, metric, chosen) for figures in (ours, base))
    gain = paired_difference(one, other, seed) if one else Estimate(math.nan, math.nan, math.nan, 0)
    return Comparison(metric, label, bootstrap_mean(list(one.values()), seed), bootstrap_mean(list(other.values()), seed), gain)


def case_means(figures: Mapping[tuple[str, int], Mapping[str, float]], metric: str, labels: Sequence[int]) -> dict[str, float]:
    """Mean of each case over those of its labels that have a figure; cases without any are left out."""
    found: dict[str, list[float]] = {}
    for (case, label), values in figures.items():
        if label in labels and math.isfinite(values[metric]):
            found.setdefault(case, []).append(values[metric])
    return {case: float(np.mean(values)) for case, values in found.items()}


def _label_maps(folder: Path) -> dict[str, Path]:
    """Label maps of a folder by case."""
    files = sorted(path for path in folder.glob("*") if path.name.endswith(ENDINGS) and not path.name.startswith(".")) if folder.is_dir() else []
    if not files:
        raise UserError("the folder holds no label maps", folder, f"give a folder of {', '.join(ENDINGS)} files")
    return {stem(path.name): path for path in files}


def _matching(folder: Path, cases: Mapping[str, Path], reference: Path) -> dict[str, Path]:
    """The predictions of all cases; further ones don't matter."""
    found = _label_maps(folder)
    missing = [case for case in cases if case not in found]
    if len(missing) == len(cases):
        raise UserError(f"no case is common to both folders: the reference holds {missing[0]}", folder, f"name the files as in {reference}")
    if missing:
        what = f"{len(missing)} of {len(cases)} cases of the reference have no prediction: {', '.join(missing[:5])}"
        raise UserError(what, folder, "predict them, or give a reference without them")
    return found
