"""Labels of whole volumes told from frozen features: a linear head, judged by cross-validation that keeps a subject's volumes together.

A volume's features are mean and standard deviation of its feature map (the mean alone says little after instance normalisation). Folds are drawn by
subject, so that every class is spread over them. Of each fold, logistic regression on standardised features learns from the others; the strength of its
penalty is chosen by further folds of these. Probabilities of different folds come from different models: the area under the ROC curve counts pairs of
one fold only. Intervals are those of a bootstrap that draws subjects; methods are compared within the same draws.

The same is done with the same network before any training, and with statistics of the intensities and the volume.
"""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nnssl_ext.core.errors import UserError, did_you_mean
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.evaluation.features import Extractor
from nnssl_ext.evaluation.statistics import Estimate, bootstrap_weights, percentile_interval, weighted_auc
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.io.case import Case
from nnssl_ext.preprocessing.preprocessor import Loaded, Preprocessor, load

RANDOM, STATISTICS = "random weights", "intensity statistics"
COLUMNS = ("case", "subject", "label")
FOLDS, INNER_FOLDS = 5, 3  # at most
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # scikit-learn's C: small ones shrink the weights more
_PERCENTILES = (5.0, 50.0, 95.0)
_FLOOR = 1e-6  # probability of a class that the training cases lack
_CLEAR = 1e-9  # by which a loss must be smaller to count as such


@dataclass(frozen=True)
class Labelled:
    """A line of the table: identifier of a volume, whose it is, its class."""

    case: str
    subject: str
    label: str


@dataclass(frozen=True)
class Predicted:
    """Out-of-fold predictions: probabilities (n, classes) and the fold of each case, (n,)."""

    probabilities: np.ndarray
    folds: np.ndarray


def read_labels(file: Path) -> list[Labelled]:
    """The lines of a table with the columns case, subject and label, sorted by case.

    Raises:
        UserError: unreadable, a missing column, an empty field, a case twice, fewer than two classes.
    """
    try:
        with open(file, encoding="utf-8-sig", newline="") as content:
            rows = list(csv.DictReader(content))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the table can't be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}", file, "give a CSV file: case,subject,label"
        ) from error
    if not rows or any(column not in rows[0] for column in COLUMNS):
        raise UserError("the table needs the columns case, subject and label, and lines", file, "write them into its first line, with commas between")
    found = [Labelled(*((row[column] or "").strip() for column in COLUMNS)) for row in rows]
    names = [line.case for line in found]
    for number, line in enumerate(found, start=2):
        if not (line.case and line.subject and line.label):
            raise UserError("a field of the table is empty", f"{file}, line {number}", "fill case, subject and label")
        if names.count(line.case) > 1:
            raise UserError(f"the case {line.case} is named more than once", f"{file}, line {number}", "give each case one line")
    classes = {line.label for line in found}
    if len(classes) < 2:
        raise UserError(f"all cases are of one class, '{classes.pop()}'", file, "give cases of at least two classes")
    return sorted(found, key=lambda line: line.case)


def matched(lines: Sequence[Labelled], cases: Sequence[Case]) -> list[Case]:
    """The case of each line.

    Raises:
        UserError: a line names a case that isn't there.
    """
    known = {case.identifier: case for case in cases}
    unknown = [line.case for line in lines if line.case not in known]
    if unknown:
        what = f"{len(unknown)} of {len(lines)} cases of the table have no image: {', '.join(unknown[:5])}"
        raise UserError(what, "option -images", did_you_mean(unknown[0], known))
    return [known[line.case] for line in lines]


def features_of(cases: Sequence[Case], pretrained: Pretrained, device: str = "cpu", only: str | None = None) -> dict[str, np.ndarray]:
    """Features (cases, D) by method: of the checkpoint, of random weights, of the intensities; or of `only` one of them."""
    extractors = {pretrained.method: Extractor.load(pretrained, device=device), RANDOM: Extractor.untrained(pretrained, device=device)}
    extractors = {name: extractor for name, extractor in extractors.items() if only in (None, name)}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in (*extractors, STATISTICS)}
    for case in cases:
        loaded = load(case).cropped()
        rows[STATISTICS].append(statistics_of(loaded))  # before normalisation overwrites the voxels
        finished = Preprocessor(pretrained.config).finish(loaded)
        for name, extractor in extractors.items():
            values = extractor.features(finished.array, Geometry.from_dict(finished.info["stored"]), finished.info["fill"]).values
            rows[name].append(pooled(values))
    return {name: np.stack(values) for name, values in rows.items()}


def pooled(values: np.ndarray) -> np.ndarray:
    """Mean and standard deviation (2C,) of a feature map (C, d, h, w)."""
    flat = values.reshape(len(values), -1)
    return np.concatenate([flat.mean(1), flat.std(1)])


def statistics_of(loaded: Loaded) -> np.ndarray:
    """Mean, standard deviation and percentiles of each channel's intensities in the body, and the body's volume in ml."""
    inside = loaded.array[:, loaded.body]
    volume = loaded.body.sum() * math.prod(loaded.geometry.spacing) / 1000
    return np.concatenate([inside.mean(1), inside.std(1), np.percentile(inside, _PERCENTILES, axis=1).ravel(), [volume]])


def fold_numbers(labels: np.ndarray, subjects: np.ndarray, most: int, seed: int = 0) -> np.ndarray:
    """Fold of each case, (n,): at most `most`, and as few as the rarest class has subjects; all 0 where that is one.

    Args:
        labels: class numbers, (n,).
        subjects: (n,); a subject's cases lie in one fold.
    """
    count = min(most, *(len(set(subjects[labels == label])) for label in np.unique(labels)))
    folds = np.zeros(len(labels), int)
    if count > 1:
        state = int(sample_rng(seed, 0, "classification folds").integers(2**31))
        for number, (_, held_out) in enumerate(StratifiedGroupKFold(count, shuffle=True, random_state=state).split(labels, labels, subjects)):
            folds[held_out] = number
    return folds


def held_out_folds(labels: np.ndarray, subjects: np.ndarray, seed: int = 0) -> np.ndarray:
    """The folds that are held out in turn, (n,).

    Raises:
        UserError: a class with one subject only.
    """
    folds = fold_numbers(labels, subjects, FOLDS, seed)
    if not folds.any():
        raise UserError("a class has volumes of one subject only", "option -labels", "give volumes of at least two subjects of each class")
    return folds


def cross_validated(features: np.ndarray, labels: np.ndarray, subjects: np.ndarray, seed: int = 0) -> Predicted:
    """Predictions of every case by a model that has seen no case of its subject; raises what `held_out_folds` raises."""
    folds = held_out_folds(labels, subjects, seed)
    probabilities = np.zeros((len(labels), int(labels.max()) + 1))
    for fold in np.unique(folds):
        test = folds == fold
        strength = chosen_strength(features[~test], labels[~test], subjects[~test], seed)
        probabilities[test] = _probabilities(features[~test], labels[~test], features[test], strength, probabilities.shape[1])
    return Predicted(probabilities, folds)


def chosen_strength(features: np.ndarray, labels: np.ndarray, subjects: np.ndarray, seed: int) -> float:
    """C with the smallest log loss over folds of these cases, the smallest of several; 1 where the subjects don't make two folds."""
    if len(np.unique(labels)) < 2:
        return 1.0
    folds, classes = fold_numbers(labels, subjects, INNER_FOLDS, seed), int(labels.max()) + 1
    if not folds.any():
        return 1.0
    best, least = STRENGTHS[0], math.inf
    for strength in STRENGTHS:
        loss = 0.0
        for fold in np.unique(folds):
            test = folds == fold
            found = _probabilities(features[~test], labels[~test], features[test], strength, classes)
            loss -= float(np.log(np.maximum(found[np.arange(len(found)), labels[test]], _FLOOR)).sum())
        if loss < least - _CLEAR:
            best, least = strength, loss
    return best


def _probabilities(train: np.ndarray, labels: np.ndarray, test: np.ndarray, strength: float, classes: int) -> np.ndarray:
    """(m, classes); a class that the training cases lack has 0."""
    found = np.zeros((len(test), classes))
    present = np.unique(labels)
    if len(present) == 1:
        found[:, present[0]] = 1
        return found
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # with few cases the weights may grow without end; the penalty is chosen anyway
        found[:, present] = model.fit(train, labels).predict_proba(test)
    return found


def judge(predicted: Mapping[str, Predicted], labels: np.ndarray, subjects: np.ndarray, seed: int = 0) -> list[dict[str, Any]]:
    """ "auc" and "accuracy" of each method and, but for random weights themselves, the paired gains "auc_gain" and "accuracy_gain" over them (`Estimate`).

    The AUC is that of the second class against the first, of several classes the mean of each against the rest.
    """
    weights = np.concatenate([np.ones((1, len(labels))), bootstrap_weights(subjects.tolist(), seed)])
    draws = {name: {"auc": _auc(one, labels, weights), "accuracy": _accuracy(one, labels, weights)} for name, one in predicted.items()}
    count, found = len(set(subjects)), []
    for name, own in draws.items():
        row: dict[str, Any] = {"method": name, **{metric: _estimate(values, count) for metric, values in own.items()}}
        base = draws.get(RANDOM) if name != RANDOM else None
        found.append(row | {f"{metric}_gain": _estimate(values - base[metric], count) if base else None for metric, values in own.items()})
    return found


def _auc(one: Predicted, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    classes = range(1, 2) if one.probabilities.shape[1] == 2 else range(one.probabilities.shape[1])
    return np.asarray(np.mean([weighted_auc(one.probabilities[:, number], labels == number, weights, one.folds) for number in classes], axis=0))


def _accuracy(one: Predicted, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.asarray(weights @ (one.probabilities.argmax(1) == labels) / weights.sum(1))


def _estimate(draws: np.ndarray, count: int) -> Estimate:
    """The first value is that of the cases themselves, the others are those of the bootstrap."""
    return Estimate(float(draws[0]), *percentile_interval(draws[1:]), count)
