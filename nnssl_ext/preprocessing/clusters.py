"""Cluster labels of preprocessed voxels: a folder beside the cases, with the model of the clusters and a label volume and JSON file for each case."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import read_json, sha256_file, write_json
from nnssl_ext.core.geometry import Box, box_slices
from nnssl_ext.preprocessing.arrays import compress, open_array, write

FOLDER, MODEL = "clusters", "model.npz"  # inside a configuration's folder, inside that
SCHEMA_VERSION = 1
_OPEN_FILES = 64


def write_labels(folder: Path, identifier: str, labels: np.ndarray, model: str, source: str, patch_size: Sequence[int]) -> None:
    """Write the labels of a case; their JSON file comes last and marks them as whole.

    Args:
        folder: of the labels.
        labels: (z, y, x), 0 = outside of the body, 1 to K = the clusters; stored as uint8, or as uint16 for more than 255 clusters.
        model: hash of the cluster model.
        source: hash of the case's file that they were made of.
        patch_size: voxels of a training patch, (z, y, x).
    """
    content = compress(labels[None].astype(np.uint8 if labels.max(initial=0) < 256 else np.uint16), patch_size)
    write(folder / f"{identifier}.b2nd", content)
    about = {"schema_version": SCHEMA_VERSION, "model": model, "source": source, "sha256": hashlib.sha256(content).hexdigest()}
    write_json(folder / f"{identifier}.json", about)


def are_current(folder: Path, identifier: str, model: str, source: str) -> bool:
    """Whether the labels of a case are there, undamaged, and made of this file with this model."""
    file = folder / f"{identifier}.b2nd"
    about = _about(folder, identifier)
    return _matches(about, model, source) and file.is_file() and sha256_file(file) == about["sha256"]


def read_model(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a cluster model by name: "identity" (its hash), "centres" (K, N), ...

    Raises:
        UserError: there is none, or the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except FileNotFoundError:
        fix = f"nnssl_cluster fit {' '.join(_names(path.parent))} -ckpt CHECKPOINT, then nnssl_cluster assign {' '.join(_names(path.parent))}"
        raise UserError("no clusters have been fitted", path.parent, fix) from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"the cluster model can't be read: {error}", path, f"nnssl_cluster fit {' '.join(_names(path.parent))} -ckpt CHECKPOINT") from None


class ClusterLabels:
    """The labels of all cases of a store; its reading side is that of a store with one channel.

    Args:
        folder: of the labels.
        identifiers: of the store's cases.
        shapes: their voxels (z, y, x), (N, 3).
        sources: hashes of their files, (N,).

    Attributes:
        model: hash of the cluster model.
        classes: K, number of its clusters.

    Raises:
        UserError: there is no model, or not every case has labels of this model.
    """

    def __init__(self, folder: Path, identifiers: Sequence[str], shapes: np.ndarray, sources: np.ndarray) -> None:
        content = read_model(folder / MODEL)
        self.folder, self.identifiers, self.shapes = folder, identifiers, shapes
        self.model, self.classes = str(content["identity"]), len(content["centres"])
        missing = [name for name, source in zip(identifiers, sources.astype(str)) if not _matches(_about(folder, name), self.model, source)]
        if missing:
            what = f"{len(missing)} of {len(identifiers)} cases have no labels of the present clusters: {', '.join(missing[:3])}"
            raise UserError(what, folder, f"nnssl_cluster assign {' '.join(_names(folder))}")
        self._array = lru_cache(_OPEN_FILES)(self._opened)

    def __getstate__(self) -> dict[str, Any]:  # open files stay with their process
        return {key: value for key, value in self.__dict__.items() if key != "_array"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._array = lru_cache(_OPEN_FILES)(self._opened)

    def shape(self, case: int) -> tuple[int, ...]:
        """Voxels (z, y, x)."""
        return tuple(self.shapes[case].tolist())

    def fill(self, case: int) -> list[float]:
        """The label beyond a case."""
        return [0.0]

    def read(self, case: int, box: Box) -> np.ndarray:
        """Labels of a box inside the case, (1, z, y, x) unsigned: 0 = outside of the body, 1 to K = the clusters.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            crop: np.ndarray = self._array(case)[box_slices(box)]
            return crop
        except (RuntimeError, OSError, ValueError) as error:
            file = self.folder / f"{self.identifiers[case]}.b2nd"
            raise UserError(f"labels can't be read: {error}", file, f"nnssl_cluster assign {' '.join(_names(self.folder))}, which makes them again") from None

    def _opened(self, case: int) -> Any:
        file = self.folder / f"{self.identifiers[case]}.b2nd"
        if sha256_file(file) != _about(self.folder, self.identifiers[case])["sha256"]:
            raise ValueError("their hash differs from the recorded one")
        array = open_array(file)
        if array.shape[1:] != self.shape(case):
            raise ValueError("they have another shape than the case")
        return array


def _about(folder: Path, identifier: str) -> dict[str, Any]:
    """What was written with the labels of a case; empty where there is nothing or nothing readable."""
    try:
        content = read_json(folder / f"{identifier}.json")
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}


def _matches(about: dict[str, Any], model: str, source: str) -> bool:
    return (about.get("schema_version"), about.get("model"), about.get("source")) == (SCHEMA_VERSION, model, source) and "sha256" in about


def _names(folder: Path) -> tuple[str, str]:
    """Dataset and configuration of a folder of labels, as a command line takes them."""
    dataset, configuration = folder.parents[1].name, folder.parent.name.partition("_")[2]
    return dataset.removeprefix("Dataset").partition("_")[0], configuration
