"""Where the metrics and pictures of a run go: metrics.jsonl, progress.png, TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from PIL import Image

from nnssl_ext.core.errors import UserError, did_you_mean
from nnssl_ext.core.files import read_json, write_json, write_text
from nnssl_ext.trainers.pace import Pace
from nnssl_ext.trainers.progress import draw_progress

VARIABLE = "nnssl_sinks"  # the sinks beside the run's own files, such as "tensorboard,wandb"; "none" for no other
STATE = "sinks.json"  # in the results folder: by what name a server knows this run

End = Literal["finished", "stopped", "failed"]
Record = dict[str, Any]


class Sink(Protocol):
    """What takes the records and pictures of a run, on one process only.

    Whatever a sink raises is told once; the sink is then left out, unless it is `lasting` (the run's own files: they are tried again).
    """

    lasting: ClassVar[bool]

    def add(self, record: Record, step: int) -> None:
        """Numbers (None where not finite) by name, and "alarms", a list of sentences, after `step` optimiser steps."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """A PNG file that was written."""

    def close(self, end: End, reason: str) -> None:
        """The run ends; `reason` is "" when it is finished."""


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record but for its position."""
    numbers = {name: value for name, value in record.items() if name not in ("epoch", "step", "time") and isinstance(value, (int, float))}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def read_metrics(file: Path) -> list[Record]:
    """Records of a metrics.jsonl; empty when there is none. A last line that a crash cut off is left out.

    Raises:
        UserError: a line before the last one is damaged.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"line {number} is no JSON object", file, "restore the file, or delete it: training then starts new curves") from None
    return records


class MetricsFile:
    """metrics.jsonl: one JSON object per epoch, appended; whatever follows the step where a run continues is cut off first."""

    lasting: ClassVar[bool] = True

    def __init__(self, file: Path, step: int) -> None:
        self.file, self.records = file, [record for record in read_metrics(file) if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        if file.exists() and file.read_text(encoding="utf-8") != text:
            write_text(file, text)
        self.size, self.pending = len(text.encode()), ""

    def add(self, record: Record, step: int) -> None:
        self.records.append(record)
        self.pending += json.dumps(record, allow_nan=False) + "\n"
        data = self.pending.encode()
        with open(self.file, "ab") as file:
            file.truncate(self.size)  # half a line of a failed attempt
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.size, self.pending = self.size + len(data), ""

    def picture(self, name: str, path: Path, step: int) -> None:
        pass

    def close(self, end: End, reason: str) -> None:
        if self.pending:
            raise OSError(f"{self.pending.count(chr(10))} epochs are missing in {self.file}")


class ProgressPicture:
    """progress.png: all curves, redrawn so rarely that it costs next to nothing."""

    lasting: ClassVar[bool] = True

    def __init__(self, file: Path, records: list[Record]) -> None:
        self.file, self.records, self.pace, self.drawn = file, list(records), Pace(), len(records)

    def add(self, record: Record, step: int) -> None:
        self.records.append(record)
        if self.pace.due():
            self._draw()

    def _draw(self) -> None:
        with self.pace:
            draw_progress(self.records, self.file)
        self.drawn = len(self.records)

    def picture(self, name: str, path: Path, step: int) -> None:
        pass

    def close(self, end: End, reason: str) -> None:
        if self.drawn < len(self.records):
            self._draw()


class TensorBoard:
    """Event files in the folder tensorboard; `tensorboard --logdir $nnssl_results` compares runs."""

    lasting: ClassVar[bool] = False

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        self.folder, self.settings, self.step = folder / "tensorboard", settings, step
        self.writer: Any = None

    def _open(self) -> Any:
        if self.writer is None:  # imported when there is something to write: it takes a second
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=self.step + 1)  # type: ignore[no-untyped-call]
            if self.step == 0:
                self.writer.add_text("run", "    " + json.dumps(self.settings, indent=2).replace("\n", "\n    "), 0)
        return self.writer

    def add(self, record: Record, step: int) -> None:
        writer = self._open()
        for name, value in scalars(record).items():
            writer.add_scalar(name, value, step)
        for number, alarm in enumerate(record.get("alarms", ())):
            writer.add_text(f"alarms/{number}", alarm, step)
        writer.flush()

    def picture(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as picture:
            self._open().add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self, end: End, reason: str) -> None:
        if self.writer is not None:
            self.writer.close()


class _Server:
    """The run's name on a server and the last step sent, kept in the results folder: a continued run goes on in the same curves."""

    lasting: ClassVar[bool] = False
    name: ClassVar[str]

    def __init__(self, folder: Path, step: int) -> None:
        self.file = folder / STATE
        state = read_json(self.file) if self.file.is_file() else {}
        self.known = state.get(self.name) if step else None  # a run that starts anew gets a new name
        self.sent = int(self.known["step"]) if self.known else 0

    def remember(self, identifier: str, step: int) -> None:
        self.sent = step
        state = read_json(self.file) if self.file.is_file() else {}
        write_json(self.file, {**state, self.name: {"id": identifier, "step": step}})


class WandB(_Server):
    """Weights & Biases; its own variables (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, ...) say where."""

    name = "wandb"

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        import wandb

        super().__init__(folder, step)
        self.module, self.id = wandb, self.known["id"] if self.known else uuid.uuid4().hex[:12]
        place = {"project": os.environ.get("WANDB_PROJECT", "nnssl"), "group": settings["dataset"], "dir": str(folder)}
        self.run = wandb.init(**place, id=self.id, name=settings["name"], config=dict(settings), resume="allow")
        self.remember(self.id, self.sent)

    def add(self, record: Record, step: int) -> None:
        if step > self.sent:
            self.run.log({**scalars(record), "epoch": record["epoch"]}, step=step)
            for alarm in record.get("alarms", ()):
                self.run.alert(title=f"step {step}", text=alarm)
            self.remember(self.id, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self.run.log({name: self.module.Image(str(path))}, step=step)

    def close(self, end: End, reason: str) -> None:
        self.run.finish(exit_code=0 if end == "finished" else 1)


class MLflow(_Server):
    """MLflow; MLFLOW_TRACKING_URI says where, MLFLOW_EXPERIMENT_NAME under which experiment (default: the dataset)."""

    name = "mlflow"
    statuses: ClassVar[dict[End, str]] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        for variable, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}.items():
            os.environ.setdefault(variable, value)  # a server that is down must not hold up the training for long
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        super().__init__(folder, step)
        self.client, self.metric = MlflowClient(), Metric
        if self.known:
            self.id = str(self.known["id"])
            self.client.update_run(self.id, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", settings["dataset"])
            found = self.client.get_experiment_by_name(name)
            experiment = self.client.create_experiment(name) if found is None else found.experiment_id
            self.id = str(self.client.create_run(experiment, run_name=settings["name"]).info.run_id)
            self.client.log_batch(self.id, params=[Param(key, str(value)[:500]) for key, value in _flat(settings).items()])
        self.remember(self.id, self.sent)

    def add(self, record: Record, step: int) -> None:
        if step > self.sent:
            now = int(record["time"] * 1000)
            self.client.log_batch(self.id, metrics=[self.metric(name, value, now, step) for name, value in scalars(record).items()])
            for alarm in record.get("alarms", ()):
                self.client.set_tag(self.id, "alarm", alarm)
            self.remember(self.id, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self.client.log_artifact(self.id, str(path), "pictures")

    def close(self, end: End, reason: str) -> None:
        if reason:
            self.client.set_tag(self.id, "end", reason)
        self.client.set_terminated(self.id, status=self.statuses[end])


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as "config.lr": ..."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


SINKS: dict[str, tuple[str, Any]] = {"tensorboard": ("tensorboard", TensorBoard), "wandb": ("wandb", WandB), "mlflow": ("mlflow", MLflow)}  # module, class


def chosen_sinks() -> list[str]:
    """Names of the sinks that the environment asks for.

    Raises:
        UserError: an unknown name, or the package of one is not installed.
    """
    names = [name.strip() for name in (os.environ.get(VARIABLE) or "tensorboard").split(",")]
    names = [name for name in dict.fromkeys(names) if name and name != "none"]
    for name in names:
        if name not in SINKS:
            raise UserError(f"unknown sink '{name}'", f"environment variable {VARIABLE}", did_you_mean(name, [*SINKS, "none"]))
        if importlib.util.find_spec(SINKS[name][0]) is None:
            raise UserError(f"the package for the sink '{name}' is not installed", f"environment variable {VARIABLE}", f"pip install {SINKS[name][0]}")
    return names
