"""The probe of a finished pretraining: organs told from the frozen features of single cells, learned from few labelled volumes.

A cell is one position of the feature map of a whole volume (`features.Extractor`); its label is that of most of its voxels, and cells less than 60 % of
whose voxels have it are left out. Cells of the labelled volumes, at most 50,000 with no class much more frequent than the others, teach the two classifiers
of `evaluation.probe`: 20 nearest neighbours by cosine similarity, and multinomial logistic regression on standardised features. The figure of a test volume
is the Dice over its cells, averaged over the foreground classes that it holds.

The same is done with the same network before any training, and with the voxels of the cells themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.evaluation.feature_files import find_cases
from nnssl_ext.evaluation.features import Extractor
from nnssl_ext.evaluation.probe import (
    OUTSIDE,
    LabelledCase,
    cell_labels,
    ignored_label,
    label_file,
    labelled_cases,
    labelled_volume,
    linear_classifier,
    mean_dice,
    nearest_neighbours,
    split,
)
from nnssl_ext.evaluation.statistics import bootstrap_mean, paired_difference
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.finetuning.subsets import nested_subset
from nnssl_ext.preprocessing.preprocessor import Finished
from nnssl_ext.trainers.pictures import enlarge

RANDOM, RAW_PATCHES = "random weights", "raw intensities"
VOLUMES = (1, 5, 10)  # labelled ones, as far as there are as many
PURITY = 0.6  # share of a cell's voxels that its label needs
TOKENS = 50_000  # cells that the classifiers learn from, at most
CASE_TOKENS = 16_384  # of one volume, at most
CLASSIFIERS = {"k-NN": nearest_neighbours, "linear": linear_classifier}

Encode = Callable[[Finished], np.ndarray]  # features (C, d, h, w) of a preprocessed volume


@dataclass(frozen=True)
class Tokens:
    """Cells of one volume: labels (n,) int64, and features (n, C) float32 by method."""

    labels: np.ndarray
    features: dict[str, np.ndarray]


def find_labelled(folder: Path, pretrained: Pretrained) -> tuple[list[LabelledCase], list[LabelledCase]]:
    """Training and test cases of a labelled dataset: imagesTs with labelsTs is the test where it exists, else a third of the subjects of imagesTr.

    Raises:
        UserError: no label maps, fewer than two labelled subjects, channels or modalities that the plan doesn't know.
    """
    training = labelled_cases(folder, pretrained.plan, pretrained.config)
    if not (folder / "labelsTs").is_dir():
        return split(training)
    cases = find_cases([folder / "imagesTs"], pretrained, training[0][0].modalities)
    test = [(case, path) for case in cases if (path := label_file(case.images[0], "labelsTs")).is_file()]
    return (training, test) if test else split(training)


def volumes_wanted(wanted: Sequence[int] | None, available: int) -> list[int]:
    """Numbers of labelled volumes, ascending: what the user asks for, else `VOLUMES` as far as there are as many."""
    return sorted(set(wanted)) if wanted else [count for count in VOLUMES if count <= available]


def evaluate(pretrained: Pretrained, folder: Path, wanted: Sequence[int] | None = None, device: str = "cpu", only: str | None = None) -> list[dict[str, Any]]:
    """Dice of every test case by method ("method"), number of labelled volumes ("volumes") and classifier ("classifier"): "case", "dice".

    Args:
        pretrained: the checkpoint.
        folder: of the labelled dataset, nnU-Net's raw format.
        wanted: numbers of labelled volumes; smaller subsets lie within larger ones, and are those of `nnssl_finetune -n` where it trains on the same cases.
        device: where the backbone runs.
        only: the one method to judge; None: the checkpoint's, random weights and raw intensities.

    Raises:
        UserError: what `find_labelled` raises, more volumes wanted than labelled, unreadable cases, volumes of one class only.
    """
    training, test = find_labelled(folder, pretrained)
    counts = volumes_wanted(wanted, len(training))
    names = [case.identifier for case, _ in training]
    subsets = {count: nested_subset(names, count) for count in counts}
    extractors = {pretrained.method: Extractor.load(pretrained, device=device), RANDOM: Extractor.untrained(pretrained, device=device)}
    cell = extractors[RANDOM].cell
    encoders: dict[str, Encode] = {name: partial(_encoded, extractor) for name, extractor in extractors.items()}
    encoders[RAW_PATCHES] = lambda volume: raw_patches(volume.array, cell, volume.info["fill"])
    encoders = {name: encode for name, encode in encoders.items() if only in (None, name)}
    ignore, used = ignored_label(folder), set(subsets[counts[-1]])

    def read(pairs: Sequence[LabelledCase], balance: bool) -> dict[str, Tokens]:
        return {pair[0].identifier: tokens_of(labelled_volume(pair, pretrained.config, ignore), cell, encoders, balance) for pair in pairs}

    labelled = read([pair for pair in training if pair[0].identifier in used], True)
    held_out = read(test, False)
    return [row for count in counts for row in _judge([labelled[name] for name in subsets[count]], held_out, count, folder, device)]


def _encoded(extractor: Extractor, volume: Finished) -> np.ndarray:
    return extractor.features(volume.array, Geometry.from_dict(volume.info["stored"]), volume.info["fill"]).values


def _judge(training: Sequence[Tokens], test: Mapping[str, Tokens], count: int, folder: Path, device: str) -> list[dict[str, Any]]:
    labels = np.concatenate([tokens.labels for tokens in training])
    if len(np.unique(labels)) < 2:
        what = f"the {count} labelled volume(s) hold cells of one class only"
        raise UserError(what, folder / "labelsTr", "use more volumes, or a backbone with smaller cells: structures must fill most of one")
    chosen = balanced(labels)
    rows: list[dict[str, Any]] = []
    for method in training[0].features:
        known = torch.from_numpy(np.concatenate([tokens.features[method] for tokens in training])[chosen]).to(device)
        truth = torch.from_numpy(labels[chosen]).to(device)
        together = torch.from_numpy(np.concatenate([tokens.features[method] for tokens in test.values()])).to(device)
        for name, classify in CLASSIFIERS.items():
            found = classify(known, truth, together).cpu().split([len(tokens.labels) for tokens in test.values()])
            for (case, tokens), predicted in zip(test.items(), found):
                dice = mean_dice(predicted, torch.from_numpy(tokens.labels))
                rows.append({"method": method, "volumes": count, "classifier": name, "case": case, "dice": dice})
    return rows


def tokens_of(volume: Finished, cell: Sequence[int], encoders: Mapping[str, Encode], balance: bool) -> Tokens:
    """Pure cells of a volume with a label, at most `CASE_TOKENS`, drawn at random but always alike.

    Args:
        volume: preprocessed, with the mask "labels".
        cell: voxels per cell, (z, y, x).
        encoders: what gives the features, by method.
        balance: for training: leave out background beyond the largest foreground class.
    """
    labels = whole_cells(volume.masks["labels"][None], cell, [OUTSIDE])[0]
    majority = cell_labels(labels, cell)
    known = np.where(purity(labels, majority, cell) >= PURITY, majority, OUTSIDE).reshape(-1)
    usable = np.flatnonzero(known >= 0)
    usable = usable[balanced(known[usable], CASE_TOKENS)] if balance else usable
    chosen = np.sort(sample_rng(0, 0, "token probe cells").permutation(usable)[:CASE_TOKENS])
    features = {name: np.ascontiguousarray(encode(volume).reshape(-1, known.size)[:, chosen].T, np.float32) for name, encode in encoders.items()}
    return Tokens(known[chosen].astype(np.int64), features)


def purity(labels: np.ndarray, majority: np.ndarray, cell: Sequence[int]) -> np.ndarray:
    """Share of each cell's voxels that have its label, (d, h, w).

    Args:
        labels: (z, y, x), whole cells.
        majority: of each cell, (d, h, w).
        cell: voxels per cell.
    """
    same = labels == enlarge(majority, labels.shape)
    shares: np.ndarray = same.reshape([n for pair in zip(majority.shape, cell) for n in pair]).mean((1, 3, 5))
    return shares


def balanced(labels: np.ndarray, limit: int = TOKENS) -> np.ndarray:
    """Sorted indices of at most `limit` cells: each class has its equal share or all its cells, the background no more than the largest other class."""
    values, counts = np.unique(labels, return_counts=True)
    most = min(limit // max(1, len(values)), int(counts[values > 0].max(initial=0)) or limit)
    rng = sample_rng(0, 0, "token probe balance")
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == value))[:most] for value in values] or [np.zeros(0, int)]))


def raw_patches(array: np.ndarray, cell: Sequence[int], fill: Sequence[float]) -> np.ndarray:
    """The voxels of each cell as its features, (channels x voxels, d, h, w), of a volume (channels, z, y, x)."""
    padded = whole_cells(array, cell, fill)
    channels, *shape = padded.shape
    d, h, w = (n // edge for n, edge in zip(shape, cell))
    patches = padded.reshape(channels, d, cell[0], h, cell[1], w, cell[2]).transpose(0, 2, 4, 6, 1, 3, 5)
    return patches.reshape(channels * math.prod(cell), d, h, w)


def whole_cells(array: np.ndarray, cell: Sequence[int], fill: Sequence[float]) -> np.ndarray:
    """A volume (channels, z, y, x) enlarged at its end to whole cells, each channel with its `fill`."""
    edges = [(0, -n % edge) for n, edge in zip(array.shape[1:], cell)]
    return np.stack([np.pad(channel, edges, constant_values=value) for channel, value in zip(array, fill)])


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each method, number of volumes and classifier: "dice" and, but for random weights themselves, the paired "gain" over them (`Estimate`)."""
    figures: dict[tuple[int, str, str], dict[str, float]] = {}
    for row in rows:
        figures.setdefault((row["volumes"], row["classifier"], row["method"]), {})[row["case"]] = row["dice"]
    found = []
    for (volumes, classifier, method), cases in figures.items():
        gain = None if method == RANDOM else paired_difference(cases, figures[volumes, classifier, RANDOM])
        found.append({"volumes": volumes, "classifier": classifier, "method": method, "dice": bootstrap_mean(list(cases.values())), "gain": gain})
    return found
