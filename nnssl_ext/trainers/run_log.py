"""What a run leaves to read and to look at: the one object that the training loop tells."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import write_json
from nnssl_ext.trainers.run_page import RunPage
from nnssl_ext.trainers.signals import Stopped
from nnssl_ext.trainers.sinks import SINKS, End, MetricsFile, ProgressPicture, Record, Sink, chosen_sinks
from nnssl_ext.trainers.terminal import Bar

PICTURES = 20  # over a whole run, at most


class RunLog:
    """Terminal, metrics, curves, pictures, the run's page, and the sinks that $nnssl_sinks names.

    Nothing in here ever ends a training: a sink that fails is told once and left out.

    Args:
        folder: results folder of the run.
        settings: of the run, written to run.json; see `description.describe`.
        step: optimiser step from which the run continues, 0 for a new one; what was recorded after it is dropped.
        quiet: on ranks other than 0: nothing is written or shown.
        bar: what shows progress on the terminal; made here by default.

    Raises:
        UserError: $nnssl_sinks names something unknown or not installed.
        DiskError: run.json can't be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int, quiet: bool = False, bar: Bar | None = None) -> None:
        self.folder, self.settings, self.step, self.quiet = folder, settings, step, quiet
        self.bar = bar or Bar(settings["total_steps"], step, quiet)
        self.sinks: dict[str, Sink] = {}
        self.alarms: list[str] = []
        self.told: set[str] = set()
        self.names = chosen_sinks()  # on every rank, so that all of them fail alike
        self.epochs = milestones(settings["config"]["epochs"])

    def __enter__(self) -> RunLog:
        self.bar.__enter__()
        if not self.quiet:
            write_json(self.folder / "run.json", self.settings)
            metrics = MetricsFile(self.folder / "metrics.jsonl", self.step)
            self.sinks = {"metrics.jsonl": metrics, "progress.png": ProgressPicture(self.folder / "progress.png", metrics.records)}
            self.sinks["index.html"] = RunPage(self.folder, self.settings, metrics.records, self.step)
            for name in self.names:
                self._guarded(name, lambda name=name: self.sinks.update({name: SINKS[name][1](self.folder, self.settings, self.step)}))  # type: ignore[misc]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.__exit__()
        end, reason = how_it_ended(error, self.step >= self.settings["total_steps"], self.step)
        self._tell(lambda sink: sink.close(end, reason))

    def say(self, text: str) -> None:
        """A line on the terminal that stays."""
        self.bar.say(text)

    def alarm(self, text: str) -> None:
        """Something is wrong with the training; kept with the epoch's record, shown on the page."""
        self.say(f"ALARM: {text}")
        self.alarms.append(text)
        self._page(lambda page: page.alarm(text))

    def advance(self, step: int, loss: float) -> None:
        """After step number `step` (counted from 1); `loss` is the epoch's mean so far."""
        self.step = step
        self.bar.advance(step, loss)
        self._page(lambda page: page.advance(step))

    def epoch(self, record: Mapping[str, Any]) -> None:
        """At the end of an epoch.

        Args:
            record: numbers by name, among them "epoch" (counted from 0) and "step" (those done); "train/...", "val/...", "health/...", "probe/...", "lr",
                "seconds", "samples_per_second", "data_wait_share".
        """
        clean: Record = {name: plain(value) for name, value in record.items()} | {"time": round(time.time(), 1)}
        if self.alarms:
            clean["alarms"], self.alarms = self.alarms, []
        self.step = clean["step"]
        self.say(self._line(clean))
        self._tell(lambda sink: sink.add(clean, clean["step"]))

    def measure(self, name: str, figures: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What `figures` gives, or nothing where that fails."""
        found: dict[str, float] = {}
        self._guarded(name, lambda: found.update(figures()))
        return found

    def draw(self, epoch: int, draw: Callable[[Path], None]) -> None:
        """A picture of the epoch (counted from 0), where one is due.

        Args:
            draw: writes a PNG file.
        """
        if self.quiet or epoch not in self.epochs:
            return
        path = self.folder / "pictures" / f"epoch_{epoch + 1:04d}.png"
        self._guarded("pictures", lambda: draw(path))
        if path.is_file():
            self._tell(lambda sink: sink.picture("views", path, self.step))

    def _line(self, record: Record) -> str:
        parts = [f"epoch {record['epoch'] + 1}/{self.settings['config']['epochs']}"]
        parts += [f"{side} {record[key]:.4f}" for side in ("train", "val") if isinstance(record.get(key := f"{side}/total"), (int, float))]
        parts += [f"{key} {record[key]:.3f}" for key in record if key.startswith("probe/") and isinstance(record[key], float)]
        for key, text in (("samples_per_second", "{:.3g} samples/s"), ("data_wait_share", "data wait {:.0%}")):
            parts += [text.format(record[key])] if isinstance(record.get(key), (int, float)) else []
        return "  ".join([*parts, f"ETA {self.bar.eta.left(record['step'])}"])

    def _page(self, call: Callable[[RunPage], None]) -> None:
        page = self.sinks.get("index.html")
        if isinstance(page, RunPage):
            self._guarded("index.html", lambda: call(page))

    def _tell(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self.sinks.items()):
            if not self._guarded(name, lambda sink=sink: call(sink)) and not sink.lasting:  # type: ignore[misc]
                del self.sinks[name]

    def _guarded(self, name: str, work: Callable[[], None]) -> bool:
        """Whether `work` was done; the first failure of that name is told."""
        try:
            work()
        except Exception as error:
            if name not in self.told:
                self.told.add(name)
                what = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                fate = "is tried again" if name not in self.names else "is left out"
                with suppress(OSError):  # the terminal itself may be gone
                    self.say(f"warning: {name} failed ({what}); training goes on, {name} {fate}")
            return False
        return True


def plain(value: Any) -> Any:
    """A number that JSON knows: None where it is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def milestones(epochs: int) -> Sequence[int]:
    """The epochs (counted from 0) that get a picture and a probe: evenly spread, the first and the last among them."""
    count = min(PICTURES, epochs)
    return sorted({round(i * (epochs - 1) / max(1, count - 1)) for i in range(count)})


def how_it_ended(error: BaseException | None, complete: bool, step: int) -> tuple[End, str]:
    """End and reason in words."""
    if error is None:
        return ("finished", "") if complete else ("stopped", f"at step {step}, as asked")
    if isinstance(error, Stopped):
        return "stopped", str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped", "interrupted from the keyboard"
    if isinstance(error, UserError):
        return "failed", ": ".join(filter(None, (error.what, error.where)))
    return "failed", f"{type(error).__name__}: {error}"
