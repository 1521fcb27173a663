"""A cohort of phantoms for studies of learning: made once, kept as two arrays, read like a case store."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import ArrayLabels
from nnssl_ext.core.files import atomic_path, read_json, write_json
from nnssl_ext.core.geometry import Box, Geometry, box_slices
from nnssl_ext.core.plan import Normalization
from nnssl_ext.evaluation.phantom import make_phantom
from nnssl_ext.evaluation.probe import cell_labels, choose, mean_dice, nearest_neighbours
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.tokens import patchify
from nnssl_ext.preprocessing.normalize import CT, ZScore
from nnssl_ext.preprocessing.store import BODY_CELL

SIZE, SPACING = 96, 2.0  # voxels per edge, mm
UNLABELLED, MEMORY, TEST = 200, 24, 16  # volumes for pretraining, of the labelled memory of the probe, and for its test; all of different subjects
COUNT = UNLABELLED + MEMORY + TEST


def make(folder: Path, processes: int = 2, size: int = SIZE, spacing: float = SPACING) -> None:
    """Write images.npy (float16, normalised as the CT scheme does), labels.npy and bodies.npy; what is there already is kept.

    Args:
        size: voxels per edge.
        spacing: mm.
    """
    record = folder / "phantoms.json"
    settings = {"size": size, "spacing": spacing, "unlabelled": UNLABELLED, "memory": MEMORY, "test": TEST, "modality": "CT"}
    if record.is_file() and settings.items() <= read_json(record).items():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        volumes = list(pool.map(partial(_volume, size=size, spacing=spacing), range(COUNT), chunksize=8))
    images, labels, bodies = (np.stack(parts) for parts in zip(*volumes))
    inside = images[:UNLABELLED:8][bodies[:UNLABELLED:8]].astype(np.float64)
    low, high = np.percentile(inside, (0.5, 99.5))
    plan = Normalization("ct", float(inside.mean()), float(inside.std()), float(low), float(high))
    parameters = CT().parameters(images[0], bodies[0], plan)
    normalised = np.stack([CT.apply(image.astype(np.float32), parameters).astype(np.float16) for image in images])
    cells = size // BODY_CELL
    blocks = bodies.reshape(COUNT, cells, BODY_CELL, cells, BODY_CELL, cells, BODY_CELL)
    for name, array in {"images": normalised, "labels": labels, "bodies": blocks.any((2, 4, 6))}.items():
        with atomic_path(folder / f"{name}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, array)
    write_json(record, {**settings, "normalization": asdict(plan)})


def _volume(index: int, size: int, spacing: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    phantom = make_phantom(0, index, (size,) * 3, (spacing,) * 3, "CT")
    return phantom.image.astype(np.float16), phantom.labels, phantom.body


def make_pairs(folder: Path, cohort: Path, processes: int = 2) -> None:
    """Write images.npy (float16, normalised by z-score): an MR image of each unlabelled volume's subject; what is there already is kept.

    Args:
        cohort: folder of `make`.
    """
    record, made = folder / "pairs.json", read_json(cohort / "phantoms.json")
    settings = {key: made[key] for key in ("size", "spacing", "unlabelled")} | {"modality": "MR"}
    if record.is_file() and read_json(record) == settings:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        volumes = list(pool.map(partial(_second, size=made["size"], spacing=made["spacing"]), range(made["unlabelled"]), chunksize=8))
    with atomic_path(folder / "images.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, np.stack(volumes))
    write_json(record, settings)


def _second(index: int, size: int, spacing: float) -> np.ndarray:
    phantom = make_phantom(0, index, (size,) * 3, (spacing,) * 3, "MR")
    parameters = ZScore().parameters(phantom.image, phantom.body, Normalization("zscore"))
    return ZScore.apply(phantom.image, parameters).astype(np.float16)


class PhantomStore:
    """The reading side of a case store: the unlabelled volumes.

    Args:
        folder: of `make`.
        clusters: file with cluster labels of all volumes (N, 1, z, y, x).
    """

    def __init__(self, folder: Path, clusters: Path | None = None) -> None:
        self._clusters = clusters
        self.images, self.bodies = (np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("images", "bodies"))
        self.spacing = float(read_json(folder / "phantoms.json")["spacing"])

    def __len__(self) -> int:
        return UNLABELLED

    def shape(self, case: int) -> tuple[int, ...]:
        return self.images.shape[1:]

    def subject(self, case: int) -> str:
        return f"phantom_{case:04d}"

    def fill(self, case: int) -> list[float]:
        return [float(self.image(case)[0, 0, 0])]

    def geometry(self, case: int) -> Geometry:
        return Geometry(self.shape(case), (self.spacing,) * 3)

    def body(self, case: int) -> np.ndarray:
        return np.asarray(self.bodies[case])

    def image(self, case: int) -> np.ndarray:
        """A whole volume (z, y, x) as it is kept."""
        return np.asarray(self.images[case])

    def read(self, case: int, box: Box | None = None) -> np.ndarray:
        image = self.image(case)[None]
        return np.asarray(image if box is None else image[box_slices(box)], np.float32)

    @property
    def identifiers(self) -> list[str]:
        return [self.subject(case) for case in range(len(self))]

    def clusters(self) -> ArrayLabels:
        """Labels of the file that it was given."""
        assert self._clusters is not None, "cluster labels have to be given"
        labels = np.load(self._clusters)
        return ArrayLabels(list(labels), int(labels.max()))

    def verify(self, case: int) -> None:
        pass

    def data_hash(self) -> str:
        return "0" * 64


class PhantomPairs(PhantomStore):
    """The same, then the MR images of the same visits.

    Args:
        folder: of `make`.
        pairs: folder of `make_pairs`.
    """

    def __init__(self, folder: Path, pairs: Path) -> None:
        super().__init__(folder)
        self.pairs = np.asarray(np.load(pairs / "images.npy", mmap_mode="r"))

    def __len__(self) -> int:
        return 2 * UNLABELLED

    def subject(self, case: int) -> str:
        return super().subject(case % UNLABELLED)

    def info(self, case: int) -> dict[str, Any]:
        return {"session": "1", "modalities": [self.modality(case)], "stored": self.geometry(case).as_dict()}

    def modality(self, case: int) -> str:
        return ("CT", "MR")[case // UNLABELLED]

    def body(self, case: int) -> np.ndarray:
        return super().body(case % UNLABELLED)

    def image(self, case: int) -> np.ndarray:
        return np.asarray((self.images, self.pairs)[case // UNLABELLED][case % UNLABELLED])

    @property
    def identifiers(self) -> list[str]:
        return [f"{self.subject(case)}_{self.modality(case)}" for case in range(len(self))]


class TokenProbe:
    """Organs of the test volumes told from frozen tokens by their nearest labelled neighbours (see `evaluation.probe`).

    Every volume is cut into crops without overlap; what is asked for is the class of each token's majority of voxels.

    Args:
        folder: of `make`.
        patch_size: voxels of a crop, (z, y, x); divides the volume.
    """

    def __init__(self, folder: Path, patch_size: Sequence[int]) -> None:
        images, labels = (np.load(folder / f"{name}.npy", mmap_mode="r")[UNLABELLED:] for name in ("images", "labels"))
        self.images = [_tiles(volume.astype(np.float32), patch_size) for volume in images]
        self.labels = [_tiles(np.asarray(volume), patch_size) for volume in labels]

    @torch.no_grad()
    def tokens(self, backbone: Backbone) -> list[Tensor]:
        """Frozen tokens (crops, cells, C) of each volume."""
        return [backbone.dense(torch.from_numpy(crops)[:, None]).flatten(2).mT.float() for crops in self.images]

    def raw(self, token: Sequence[int]) -> list[Tensor]:
        """The voxels of each token, as `tokens`."""
        return [patchify(torch.from_numpy(crops)[:, None], tuple(token)) for crops in self.images]

    def dice(self, tokens: Sequence[Tensor], token: Sequence[int]) -> float:
        """Macro Dice of the test volumes' cells."""
        cells = [np.stack([cell_labels(crop, token).reshape(-1) for crop in crops]).reshape(-1) for crops in self.labels]
        parts = []
        for which, balance in ((slice(0, MEMORY), True), (slice(MEMORY, None), False)):
            chosen = choose(cells[which], balance)
            features = torch.cat([x.flatten(0, 1)[torch.from_numpy(index)] for x, index in zip(tokens[which], chosen)])
            known = torch.from_numpy(np.concatenate([found[index].astype(np.int64) for found, index in zip(cells[which], chosen)]))
            parts.append((features, known))
        (train, train_labels), (test, test_labels) = parts
        return mean_dice(nearest_neighbours(train, train_labels, test), test_labels)


def _tiles(volume: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Crops (n, z, y, x) of a volume, without overlap."""
    a, b, c = (n // s for n, s in zip(volume.shape, size))
    blocks = volume.reshape(a, size[0], b, size[1], c, size[2]).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(blocks.reshape(-1, *size))
