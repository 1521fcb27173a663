"""What a run leaves to read: metrics.jsonl, progress.png, and lines or a bar on the terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nnssl_ext.core.files import atomic_path, write_text


class RunLog:
    """Metrics of a run, one JSON object per epoch.

    Args:
        folder: results folder of the run.
        epoch: first epoch to come; records of this and later epochs are dropped (they are trained again).
        quiet: on ranks other than 0: nothing is written or shown.
    """

    def __init__(self, folder: Path, epoch: int, quiet: bool = False) -> None:
        self.file, self.picture, self.quiet = folder / "metrics.jsonl", folder / "progress.png", quiet
        self.records = [record for record in read_metrics(self.file) if record["epoch"] < epoch]

    def add(self, record: dict[str, Any]) -> None:
        """Append an epoch's record and redraw the curves."""
        self.records.append(record)
        if not self.quiet:
            write_text(self.file, "".join(json.dumps(r) + "\n" for r in self.records))
            draw_progress(self.records, self.picture)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; empty when there is none."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def draw_progress(records: list[dict[str, Any]], path: Path) -> None:
    """Curves of losses, learning rate and throughput over the epochs."""
    epochs = [record["epoch"] + 1 for record in records]
    figure = Figure(figsize=(10, 11), dpi=90, layout="constrained")
    loss, rate, speed = figure.subplots(3, 1, sharex=True)
    for key in sorted(key for key in records[-1] if key.startswith(("train/", "val/"))):
        style = "-" if key.startswith("train/") else "--"
        loss.plot(epochs, [record.get(key) for record in records], style, marker="." if len(epochs) < 30 else "", label=key)
    loss.set_ylabel("loss")
    loss.legend()
    rate.plot(epochs, [record["lr"] for record in records], color="tab:purple")
    rate.set_ylabel("learning rate")
    speed.plot(epochs, [record["samples_per_second"] for record in records], color="tab:green", label="samples per second")
    speed.set_ylabel("samples per second")
    share = speed.twinx()
    share.plot(epochs, [100 * record["data_wait_share"] for record in records], color="tab:red", alpha=0.6)
    share.set_ylabel("waiting for data, %", color="tab:red")
    share.set_ylim(0, 100)
    speed.set_ylim(bottom=0)
    speed.set_xlabel("epoch")
    speed.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (loss, rate, speed):
        axis.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


class Bar:
    """A progress bar with ETA on a terminal; silent elsewhere, where the lines of the epochs suffice."""

    def __init__(self, total: int, done: int, quiet: bool) -> None:
        self.console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
        self.progress = Progress(*columns, console=self.console, disable=quiet or not self.console.is_terminal, transient=True)
        self.task = self.progress.add_task("training", total=total, completed=done)
        self.quiet, self.total, self.started, self.first = quiet, total, time.monotonic(), done

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self, step: int, loss: float) -> None:
        """After step number `step` (counted from 1)."""
        self.progress.update(self.task, completed=step, description=f"loss {loss:.4f}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def line(self, text: str, step: int) -> None:
        """A line that stays, with the time that is left."""
        if not self.quiet:
            left = (time.monotonic() - self.started) / max(1, step - self.first) * (self.total - step)
            self.console.print(f"{text}  ETA {time.strftime('%H:%M:%S', time.gmtime(left))}", highlight=False, soft_wrap=True)
