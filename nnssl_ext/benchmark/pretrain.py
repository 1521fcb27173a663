"""Units of work: pretraining with a method of the suite, and the network before any."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.benchmark.data import Data
from nnssl_ext.benchmark.suite import Method
from nnssl_ext.benchmark.units import LATEST
from nnssl_ext.benchmark.untrained import untrained
from nnssl_ext.core.geometry import Box, box_slices
from nnssl_ext.core.registry import find_class
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.base import SSLTrainer
from nnssl_ext.trainers.config import parse_overrides
from nnssl_ext.trainers.sinks import VARIABLE, read_metrics

CHECKPOINT = "checkpoint_final.pth"
KEPT = 2**29  # bytes of noise in memory
EPOCHS = 5  # windows of a pretraining of given steps, each with its validation and its record


def trainer_class(name: str) -> type[SSLTrainer]:
    """The method's class.

    Raises:
        UserError: unknown; names the closest one.
    """
    return find_class(name, SSLTrainer, "nnssl_ext.trainers")


def config_of(method: Method, seed: int) -> Any:
    """The method's Config for one seed.

    Raises:
        UserError: unknown hyper-parameters, values of another type.
    """
    cls, values = trainer_class(method.trainer), dict(method.options)
    if method.steps is not None:
        values |= {"epochs": min(EPOCHS, method.steps), "iterations": max(1, method.steps // EPOCHS), "val_iterations": 1, "workers": 0}
    values |= {"seed": seed} | ({} if method.batch is None else {"batch_size": method.batch})
    return cls.Config(**parse_overrides(cls.Config, [f"{name}={_text(value)}" for name, value in values.items()]))


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


class NoiseStore(CaseStore):
    """The cases of a store with white noise in place of their voxels: there is nothing to learn in them. As many as fit into `KEPT` bytes are kept."""

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder)
        self._kept, self._bytes = dict[int, np.ndarray](), 0

    def read(self, case: int, box: Box | None = None) -> np.ndarray:
        volume = self._kept.get(case)
        if volume is None:
            volume = sample_rng(0, case, "benchmark noise").standard_normal((len(self.fill(case)), *self.shape(case)), dtype=np.float32)
            if self._bytes + volume.nbytes <= KEPT:
                self._kept[case], self._bytes = volume, self._bytes + volume.nbytes
        return volume.copy() if box is None else volume[box_slices(box)].copy()

    def data_hash(self) -> str:
        return f"noise {super().data_hash()}"


def pretrain(settings: dict[str, Any], folder: Path, given: Path | None) -> dict[str, Any]:
    """Train as `settings["method"]` says; leaves checkpoint_final.pth.

    Args:
        settings: "method" (a `Method`), "seed", "configuration", "device".
        folder: of the unit.
        given: nothing.
    """
    data, method = Data.beside(folder), Method(**settings["method"])
    store = data.store(settings["configuration"])
    store = NoiseStore(store.folder) if method.noise else store
    os.environ.setdefault(VARIABLE, "none")
    config, cls = config_of(method, settings["seed"]), trainer_class(method.trainer)
    trainer = cls(data.plan, settings["configuration"], config, store, folder, family=method.family, device=settings["device"])
    trainer.fit(resume=(folder / LATEST).is_file())
    for name in ("latest", "previous", "best"):
        (folder / f"checkpoint_{name}.pth").unlink(missing_ok=True)
    records = read_metrics(folder / "metrics.jsonl")
    names = [name for name in records[-1] if name.startswith(("train/", "val/"))]
    curves = {name: [[record["step"], record[name]] for record in records if record.get(name) is not None] for name in names}
    figures = {"steps": trainer.total_steps, **{name: records[-1][name] for name in names}}
    pictures = {}
    drawn = sorted((folder / "pictures").glob("*.png"))
    if drawn:
        pictures["what the network sees after the last epoch"] = str(drawn[-1].relative_to(folder))
    alarms = [text for record in records for text in record.get("alarms", ())]
    return {"runs": [{"figures": figures, "curves": curves, "alarms": alarms, "pictures": pictures}]}


def start(settings: dict[str, Any], folder: Path, given: Path | None) -> dict[str, Any]:
    """Leave a checkpoint before the first step; `settings`: "family", "seed", "configuration"."""
    untrained(Data.beside(folder).plan, settings["configuration"], settings["family"], settings["seed"], folder / CHECKPOINT)
    return {"runs": []}
