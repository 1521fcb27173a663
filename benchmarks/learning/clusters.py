"""Clusters of the cohort's voxels by the features of an earlier pretraining, for a method that learns to tell them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning.data import Data
from benchmarks.learning.pretrain import CHECKPOINT, LABELS
from benchmarks.phantoms import PhantomStore
from nnssl_ext.core.files import atomic_path
from nnssl_ext.evaluation.clusters import body_voxels, features_of, fit
from nnssl_ext.evaluation.features import Extractor
from nnssl_ext.finetuning.pretrained import Pretrained

VOXELS = 200_000  # that the clusters are fitted to, of all volumes


def clustered(settings: dict[str, Any], folder: Path, given: Path | None) -> dict[str, Any]:
    """As `nnssl_cluster` fits and assigns them, with windows that don't overlap; leaves the labels of all volumes."""
    assert given is not None
    pretrained, store = Pretrained.load(given / CHECKPOINT), PhantomStore(Data.beside(folder).cohort)
    extractor = Extractor.load(pretrained, overlap=0.0)
    model = fit(store, extractor, pretrained.identity, seed=settings["seed"], scratch=folder, voxels=VOXELS)  # type: ignore[arg-type]
    labels = np.empty((len(store), 1, *store.shape(0)), np.uint8)
    for case in range(len(store)):
        volume, found = features_of(store, case, extractor)  # type: ignore[arg-type]
        labels[case] = model.labels(found, volume, body_voxels(store, case))  # type: ignore[arg-type]
    with atomic_path(folder / LABELS) as temporary, open(temporary, "wb") as file:
        np.save(file, labels)
    return {"model": model.identity, "clusters": len(model.centres), "shares": model.settings["shares"]}
