"""Pretraining on the cohort with a method of the suite."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.common import PAIRED
from benchmarks.learning.data import CONFIGURATION, Data
from benchmarks.learning.suite import EPOCHS
from benchmarks.methods import methods
from benchmarks.phantoms import PhantomPairs, PhantomStore
from nnssl_ext.trainers.sinks import VARIABLE, read_metrics

CHECKPOINT, LABELS = "checkpoint_final.pth", "labels.npy"


def pretrain(settings: dict[str, Any], folder: Path, given: Path | None) -> dict[str, Any]:
    """Train as `settings["entry"]` says, on the cluster labels in the folder `given` where there is one; leaves checkpoint_final.pth."""
    entry, data = settings["entry"], Data.beside(folder)
    cls = methods()[entry["method"]]
    steps = entry["steps"] // EPOCHS
    options = {"epochs": EPOCHS, "iterations": steps, "val_iterations": 1, "batch_size": entry["batch"], "workers": 0, "seed": settings["seed"]}
    config = cls.Config(**{**options, **entry["options"]})
    plan = data.plan(entry["family"], settings["patch"], entry["batch"])
    paired = entry["method"] in PAIRED
    store = PhantomPairs(data.cohort, data.pairs) if paired else PhantomStore(data.cohort, None if given is None else given / LABELS)
    os.environ[VARIABLE] = "none"
    cls(plan, CONFIGURATION, config, store, folder, family=entry["family"]).fit()  # type: ignore[arg-type]
    records = read_metrics(folder / "metrics.jsonl")
    losses = {name: value for name, value in records[-1].items() if name.startswith(("train/", "val/"))}
    return {"steps": EPOCHS * steps, "losses": losses, "alarms": [text for record in records for text in record.get("alarms", ())]}
