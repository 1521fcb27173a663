"""index.html of a run: what it is, how far it is, its curves and pictures, and the commands that come next."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from nnssl_ext.core.errors import DiskError
from nnssl_ext.io.curves import curves
from nnssl_ext.io.page import Section, write_page
from nnssl_ext.trainers.health_charts import grouped
from nnssl_ext.trainers.pace import Pace
from nnssl_ext.trainers.progress import names, series
from nnssl_ext.trainers.sinks import End, Record
from nnssl_ext.trainers.terminal import Eta, duration

REFRESH_S = 20  # a browser reloads the page of a running training
BETWEEN_S = 30.0  # between two versions of the page within an epoch
SILENT_S = 600.0  # without a new version, the page itself says that the process is probably gone


class RunPage:
    """A sink that rewrites the page, so rarely that it costs next to nothing.

    Args:
        folder: results folder of the run; its pictures are shown.
        settings: see `description.describe`.
        records: those of former processes.
        step: from which the run continues.
    """

    lasting: ClassVar[bool] = True

    def __init__(self, folder: Path, settings: Mapping[str, Any], records: Sequence[Record], step: int) -> None:
        self.folder, self.settings, self.records, self.step = folder, settings, list(records), step
        self.alarms = [(record["epoch"] + 1, text) for record in records for text in record.get("alarms", ())]
        self.eta, self.pace, self.inside = Eta(settings["total_steps"], step), Pace(), Pace(pause=BETWEEN_S)
        with suppress(DiskError):  # told when it is written again
            self.write()

    def add(self, record: Record, step: int) -> None:
        self.records.append(record)
        self.step = step
        if self.pace.due():
            self.write()

    def picture(self, name: str, path: Path, step: int) -> None:
        if self.pace.due():
            self.write()

    def advance(self, step: int) -> None:
        """After every step; within long epochs the page is rewritten now and then."""
        self.step = step
        if self.inside.due():
            self.write()

    def alarm(self, text: str) -> None:
        self.alarms.append((max(1, math.ceil(self.step / self.settings["config"]["iterations"])), text))
        self.write()

    def close(self, end: End, reason: str) -> None:
        self.write(end, reason)

    def write(self, state: End | None = None, reason: str = "") -> None:
        """Write the page; a `state` of None means that the run goes on."""
        with self.pace, self.inside:
            run = self.settings
            sections = [health(self.records), self._pictures(), _description(run), _commands(run, self.folder, state)]
            title = f"{run['trainer']} on {run['dataset']}"
            lead = f"{run['family']} backbone, configuration {run['configuration']}, plans {run['plans']}"
            values: dict[str, Any] = {
                "state": state or "running",
                "reason": reason,
                "alarms": self.alarms,
                "progress": self._progress(),
                "charts": charts(self.records),
            }
            values |= {"refresh": REFRESH_S, "written": time.time(), "silent": max(SILENT_S, 2 * _seconds(self.records)), "resume": f"{run['command']} --c"}
            values["clock"] = time.strftime("%Y-%m-%d %H:%M:%S")
            write_page(self.folder / "index.html", title, lead, [section for section in sections if section.parts], template="run.html", **values)

    def _progress(self) -> dict[str, Any]:
        total, iterations = self.settings["total_steps"], self.settings["config"]["iterations"]
        last = self.records[-1] if self.records else {}
        facts = [
            f"step {self.step:,} of {total:,}",
            f"epoch {min(self.step // iterations + 1, self.settings['config']['epochs'])} of {self.settings['config']['epochs']}",
        ]
        facts += [f"{text.format(last[key])}" for key, text in FACTS.items() if isinstance(last.get(key), (int, float))]
        facts += [f"{duration(self.eta.clock() - self.eta.began)} in this process", f"{self.eta.left(self.step)} left"] if self.step < total else []
        return {"percent": round(100 * self.step / total, 1), "facts": facts}

    def _pictures(self) -> Section:
        section = Section("Pictures")
        files = sorted((self.folder / "pictures").glob("epoch_*.png"))
        for file in dict.fromkeys([*files[-1:], *files[:1]]):
            section.image(file, f"Epoch {int(file.stem.split('_')[1])}: middle slices of up to two samples.")
        if len(files) > 2:
            section.text(f"{len(files)} pictures lie in the folder pictures.")
        return section


FACTS = {"samples_per_second": "{:.3g} samples/s", "data_wait_share": "{:.0%} of the time waiting for data", "train/total": "training loss {:.4g}"}
FACTS |= {"val/total": "validation loss {:.4g}"}


def charts(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Titles and SVG curves: the loss, the probe, what a method measures in validation only, the loss's parts, learning rate, throughput."""
    parts = [key for key in names(records, "train/", "val/") if not key.endswith("/total")]
    measured = [key for key in parts if key.startswith("val/") and key.replace("val/", "train/") not in parts]
    wanted = {"Loss": ["train/total", "val/total"], "Probe of the frozen features": names(records, "probe/"), "Quality on validation crops": measured}
    wanted |= {"Parts of the loss": [key for key in parts if key not in measured]}
    wanted |= {"Learning rate": ["lr"], "Samples per second": ["samples_per_second"], "Share of the time waiting for data": ["data_wait_share"]}
    drawn = {title: curves({key.removeprefix("probe/"): series(records, key) for key in keys}) for title, keys in wanted.items()}
    return [(title, svg) for title, svg in drawn.items() if svg]


def health(records: Sequence[Record]) -> Section:
    """Charts of what the health monitor measured; empty where there is nothing yet."""
    section = Section("Health of the features")
    drawn = [(chart, curves({chart.label(key): series(records, key) for key in keys})) for chart, keys in grouped(names(records, "health/"))]
    shown = [(chart.title, chart.meaning, svg) for chart, svg in drawn if svg]
    if shown:
        section.charts(shown)
    return section


def _seconds(records: Sequence[Record]) -> float:
    return float(records[-1].get("seconds") or 0.0) if records else 0.0


def _description(run: Mapping[str, Any]) -> Section:
    section = Section("What runs")
    spacing = "each case's own" if run["spacing"] is None else ["own" if mm is None else f"{mm:.4g}" for mm in run["spacing"]]
    rows = [
        ("method", f"{run['trainer']}, {run['parameters']:,} trainable parameters"),
        ("data", f"{run['dataset']}: {run['cases']['train']} cases for training, {run['cases']['validation']} for validation"),
        ("hash of the data", run["data_hash"][:16]),
        ("plans", f"{run['plans']}, fingerprint {run['fingerprint_sha256'][:16]}"),
        ("patch, voxels", run["patch_size"]),
        ("spacing, mm", spacing),
        ("batch", f"{run['batch_size']} samples in each of {run['processes']} process(es) on {run['device']}"),
        ("not default", ", ".join(f"{key}={value}" for key, value in run["overrides"].items()) or "nothing"),
        ("recipe", ", ".join(f"{key} {value}" for key, value in run["recipe"].items())),
        ("versions", ", ".join(f"{package} {version}" for package, version in run["versions"].items())),
    ]
    section.table(["", "value"], rows)
    return section


def _commands(run: Mapping[str, Any], folder: Path, state: End | None) -> Section:
    section = Section("What to do next")
    final = shlex.quote(str(folder / f"checkpoint_{'final' if state == 'finished' else 'best'}.pth"))
    if state != "finished":
        section.text("Continue after an interruption, exactly where it stopped:")
        section.code(f"{run['command']} --c")
    section.text("Fine-tune with nnU-Net on the labelled dataset 901, or only write the plan and the weights:")
    section.code(f"nnssl_finetune -ckpt {final} -d 901 -c 3d_fullres -f 0\nnnssl_export -ckpt {final} -d 901 -c 3d_fullres")
    section.text("All curves beside those of other runs:")
    section.code(f"tensorboard --logdir {shlex.quote(str(folder.parents[1]))}")
    return section
