"""The online probe: how well do frozen features tell organs apart, with no fine-tuning at all?

Cases of a labelled dataset are preprocessed as those of the pretraining, and a few crops of each, around labelled voxels, are
kept. A feature cell is one position of the backbone's dense feature map (of at most 8 voxels per edge); its
label is that of most of its voxels, and cells that lie mostly outside of their case, or where labels are to be ignored, are left
out. Cells of the training cases are a labelled memory, with no more background than foreground; those of the test cases get a label

- from their 20 nearest neighbours by cosine similarity s, each with a vote of exp(s / 0.07) (Caron et al. 2021,
  arXiv:2104.14294, appendix F.1, there for whole images), "knn_dice", and
- from a linear classifier: multinomial logistic regression on standardised features, "linear_dice".

The figure is the Dice coefficient over all test cells, averaged over the foreground classes that occur among them. Split, crops
and cells depend on the dataset and the configuration alone, so that the figures of two runs can be compared.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import read_json
from nnssl_ext.core.geometry import box_slices
from nnssl_ext.core.paths import RAW, dataset_name, root
from nnssl_ext.core.plan import ConfigPlan, Plan
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.io.case import Case, stem
from nnssl_ext.io.index import read_index
from nnssl_ext.io.readers import read_volume
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.health import normalized
from nnssl_ext.preprocessing.preprocessor import Finished, Preprocessor, load, same_grid

TRAINING, TEST = 16, 8  # cases, at most
CROPS = 2  # of each case
CELLS = 8192  # for training, and for the test, at most
NEIGHBOURS, TEMPERATURE = 20, 0.07
ITERATIONS = 100  # of L-BFGS, at most
OUTSIDE = -1  # label of voxels that don't count

LabelledCase = tuple[Case, Path]


@dataclass(frozen=True)
class LabelledCrop:
    """A crop of a preprocessed case: image (C, z, y, x) float32, labels (z, y, x) int16 with OUTSIDE where they don't count."""

    image: np.ndarray
    labels: np.ndarray


class Probe:
    """Called with a backbone in evaluation mode and its device, gives "knn_dice" and "linear_dice", both in [0, 1].

    Args:
        dataset: its ID or name as the user gave it.
        training, test: crops of different subjects.
    """

    def __init__(self, dataset: str, training: Sequence[LabelledCrop], test: Sequence[LabelledCrop]) -> None:
        self.dataset, self.training, self.test = dataset, training, test

    @torch.no_grad()
    def __call__(self, backbone: Backbone, device: torch.device) -> dict[str, float]:
        train_nD, train_n = self._cells(self.training, True, backbone, device)
        test_mD, test_m = self._cells(self.test, False, backbone, device)
        if not (len(train_n) and len(test_m) and train_nD.isfinite().all() and test_mD.isfinite().all()):
            return {"knn_dice": math.nan, "linear_dice": math.nan}
        return {
            "knn_dice": mean_dice(nearest_neighbours(train_nD, train_n, test_mD), test_m),
            "linear_dice": mean_dice(linear_classifier(train_nD, train_n, test_mD), test_m),
        }

    @staticmethod
    def _cells(crops: Sequence[LabelledCrop], balance: bool, backbone: Backbone, device: torch.device) -> tuple[Tensor, Tensor]:
        """Features (n, D) and labels (n,) of the chosen cells."""
        labels = [cell_labels(crop.labels, backbone.dense_stride).reshape(-1) for crop in crops]
        features, known = [], []
        for crop, found, cells in zip(crops, labels, choose(labels, balance)):
            dense = backbone.dense(torch.from_numpy(crop.image)[None].to(device))
            features.append(dense[0].flatten(1).T[torch.from_numpy(cells).to(device)].float())
            known.append(torch.from_numpy(found[cells].astype(np.int64)).to(device))
        return torch.cat(features), torch.cat(known)


def find_probe(dataset: str, plan: Plan, configuration: str) -> Callable[[], Probe]:
    """Choose the labelled cases; nothing but the index of the dataset is read yet.

    Args:
        dataset: ID or name of a dataset in nnU-Net's raw format, in $nnUNet_raw or $nnssl_raw.
        plan, configuration: of the pretraining; its spacing, normalisation and patch size are used.

    Returns:
        what prepares the crops, which stay in memory. It raises a `UserError` when a case is unreadable, a label map is on another
        grid than its image, or nothing is labelled.

    Raises:
        UserError: unknown dataset, no label maps, fewer than two labelled subjects, channels or modalities that the plan doesn't know.
    """
    config, folder = plan.configuration(configuration), dataset_folder(dataset)
    training, test = split(labelled_cases(folder, plan, config))
    ignore = ignored_label(folder)

    def prepare() -> Probe:
        prepared = [[crop for number, case in enumerate(cases) for crop in crops_of(case, config, ignore, number)] for cases in (training, test)]
        if not all(any((crop.labels > 0).any() for crop in crops) for crops in prepared):
            raise UserError("the label maps hold no foreground", folder / "labelsTr", "probe with another dataset")
        print(f"probe: {len(training)} training and {len(test)} test cases of {folder.name}")
        return Probe(dataset, *prepared)

    return prepare


def dataset_folder(dataset: str) -> Path:
    """Where the labelled dataset lies: in $nnUNet_raw, else in $nnssl_raw.

    Raises:
        UserError: unknown dataset, or none of the two variables is set.
    """
    roots = tuple(name for name in ("nnUNet_raw", RAW) if os.environ.get(name)) or (RAW,)
    name = dataset_name(dataset, roots)
    return next(root(variable) / name for variable in roots if (root(variable) / name).is_dir())


def labelled_cases(folder: Path, plan: Plan, config: ConfigPlan) -> list[LabelledCase]:
    """Cases that have a label map, `labelsTr/CASE.nii.gz` for `imagesTr/CASE_0000.nii.gz`, and that the backbone can take.

    Raises:
        UserError: there is none, or they have other channels than the pretraining.
    """
    found = [(case, path) for case in read_index(folder) if (path := label_file(case.images[0])).is_file()]
    if not found:
        raise UserError("the dataset has no label maps", folder / "labelsTr", "probe with a dataset in nnU-Net's raw format, labels in labelsTr")
    modalities = found[0][0].modalities
    if len(modalities) != plan.channels:
        what = f"the images have {len(modalities)} channel(s) ({', '.join(modalities)}), the pretraining has {plan.channels}"
        raise UserError(what, folder, "probe with a dataset of the same channels")
    unknown = sorted(set(modalities) - set(config.normalization))
    if unknown:
        what = f"the plan has no normalisation for modality '{unknown[0]}' (it has: {', '.join(config.normalization)})"
        raise UserError(what, folder / "dataset.json", "give the channel one of these names, or probe with another dataset")
    return found


def split(cases: Sequence[LabelledCase]) -> tuple[list[LabelledCase], list[LabelledCase]]:
    """Training and test cases: a third of the subjects, chosen at random but always alike, is for the test.

    Raises:
        UserError: fewer than two subjects.
    """
    mixed = [cases[i] for i in sample_rng(0, 0, "probe split").permutation(len(cases))]
    subjects = list(dict.fromkeys(case.subject for case, _ in mixed))
    if len(subjects) < 2:
        raise UserError("the probe needs labelled cases of at least two subjects, here is one", cases[0][1].parent, "probe with a larger dataset")
    held_out = set(subjects[: max(1, len(subjects) // 3)])
    return [pair for pair in mixed if pair[0].subject not in held_out][:TRAINING], [pair for pair in mixed if pair[0].subject in held_out][:TEST]


def crops_of(pair: LabelledCase, config: ConfigPlan, ignore: int | None, number: int) -> list[LabelledCrop]:
    """Crops of a preprocessed case, each around a voxel of a label drawn at random; around its middle where nothing is labelled.

    Args:
        pair: images and label map.
        config: patch size, spacing and normalisation.
        ignore: label whose voxels don't count.
        number: of the random numbers.

    Raises:
        UserError: unreadable, or images and label map on different grids.
    """
    finished = labelled_volume(pair, config, ignore)
    short = [max(0, size - n) for size, n in zip(config.patch_size, finished.array.shape[1:])]
    edges = [(n // 2, n - n // 2) for n in short]
    image = np.stack([np.pad(channel, edges, constant_values=value) for channel, value in zip(finished.array, finished.info["fill"])])
    labels = np.pad(finished.masks["labels"], edges, constant_values=OUTSIDE)
    rng, present = sample_rng(0, number, "probe crops"), np.unique(labels[labels > 0])
    crops = []
    for _ in range(CROPS):
        middle = np.array(labels.shape) // 2
        if len(present):
            middle = rng.choice(np.argwhere(labels == rng.choice(present)))
        starts = [int(np.clip(at - size // 2, 0, n - size)) for at, size, n in zip(middle, config.patch_size, labels.shape)]
        inside = box_slices(tuple((start, start + size) for start, size in zip(starts, config.patch_size)))
        crops.append(LabelledCrop(image[inside].copy(), labels[inside[1:]].copy()))
    return crops


def labelled_volume(pair: LabelledCase, config: ConfigPlan, ignore: int | None) -> Finished:
    """A preprocessed case; its mask "labels" (z, y, x) int16 holds the labels, OUTSIDE where they don't count.

    Raises:
        UserError: unreadable, or images and label map on different grids.
    """
    case, path = pair
    loaded, (labels, geometry) = load(case), read_volume(path, constant=True)
    if not same_grid(loaded.geometry, geometry):
        raise UserError("the label map isn't on the grid of its image", path, "resample it, or take the case out of the dataset")
    labels = np.where(labels == ignore, OUTSIDE, labels).astype(np.int16)
    return Preprocessor(config).finish(replace(loaded, masks={"labels": labels}).cropped())


def cell_labels(labels: np.ndarray, strides: Sequence[int]) -> np.ndarray:
    """The label of most voxels of each cell, (d, h, w), the smallest of several; `strides` divide the shape (z, y, x)."""
    grid = [n // stride for n, stride in zip(labels.shape, strides)]
    cells = labels.reshape(grid[0], strides[0], grid[1], strides[1], grid[2], strides[2])
    values = np.unique(labels)
    majority: np.ndarray = values[np.stack([(cells == value).sum((1, 3, 5)) for value in values]).argmax(0)]
    return majority


def choose(labels: Sequence[np.ndarray], balance: bool) -> list[np.ndarray]:
    """Indices of at most `CELLS` cells with a label, drawn at random but always alike; sorted, those of each crop by themselves.

    Args:
        labels: of each crop's cells, (cells,).
        balance: leave out background beyond the number of foreground cells.
    """
    everything, rng = np.concatenate(labels), sample_rng(0, 0, "probe cells")
    foreground, background = np.flatnonzero(everything > 0), rng.permutation(np.flatnonzero(everything == 0))
    usable = np.concatenate([foreground, background[: max(len(foreground), NEIGHBOURS)] if balance else background])
    chosen = np.zeros(len(everything), bool)
    chosen[rng.permutation(usable)[:CELLS]] = True
    return [np.flatnonzero(part) for part in np.split(chosen, np.cumsum([len(part) for part in labels])[:-1])]


def nearest_neighbours(train_nD: Tensor, train_n: Tensor, test_mD: Tensor) -> Tensor:
    """Labels (m,) by the weighted vote of the nearest training cells; the smallest of several with equal votes."""
    train, classes = normalized(train_nD), int(train_n.max()) + 1
    labels = []
    for chunk in normalized(test_mD).split(1024):
        similarity, nearest = (chunk @ train.T).topk(min(NEIGHBOURS, len(train)))
        votes = F.one_hot(train_n[nearest], classes) * (similarity / TEMPERATURE).exp()[..., None]
        labels.append(votes.sum(1).argmax(1))
    return torch.cat(labels)


def linear_classifier(train_nD: Tensor, train_n: Tensor, test_mD: Tensor) -> Tensor:
    """Labels (m,) by logistic regression: mean cross-entropy + |weights|^2 / (2 n), minimised in fp64 by L-BFGS from zero.

    The penalty is that of scikit-learn's default, C = 1; features are standardised first.
    """
    train, test = train_nD.double(), test_mD.double()
    mean, deviation = train.mean(0), train.std(0, correction=0)
    scale = torch.where(deviation > 1e-6 * deviation.max(), deviation, torch.inf)  # dead features say nothing
    train, test = (train - mean) / scale, (test - mean) / scale
    classes = int(train_n.max()) + 1
    weights, bias = (torch.zeros(*shape, dtype=train.dtype, device=train.device, requires_grad=True) for shape in ((train.shape[1], classes), (classes,)))
    optimizer = torch.optim.LBFGS((weights, bias), max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(train @ weights + bias, train_n) + weights.square().sum() / (2 * len(train))
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(objective)
    return (test @ weights + bias).argmax(1)


def mean_dice(predicted_m: Tensor, labels_m: Tensor) -> float:
    """Dice of each foreground class among `labels_m` over all cells, averaged; NaN where there is none."""
    classes = [int(value) for value in labels_m.unique() if value > 0]
    sizes = [((predicted_m == value).sum() + (labels_m == value).sum(), ((predicted_m == value) & (labels_m == value)).sum()) for value in classes]
    return float(np.mean([2 * int(common) / int(total) for total, common in sizes])) if classes else math.nan


def label_file(image: Path, folder: str = "labelsTr") -> Path:
    """labelsTr/CASE.nii.gz for imagesTr/CASE_0000.nii.gz."""
    name = stem(image.name)
    return image.parent.parent / folder / (re.sub(r"_\d{4}$", "", name) + image.name.removeprefix(name))


def ignored_label(folder: Path) -> int | None:
    """The label that dataset.json calls "ignore"."""
    file = folder / "dataset.json"
    content = read_json(file) if file.is_file() else {}
    labels = content.get("labels") if isinstance(content, dict) else None
    value = labels.get("ignore") if isinstance(labels, dict) else None
    return value if isinstance(value, int) else None
