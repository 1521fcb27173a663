"""Is the training of DINOv2Trainer stable on few volumes and small batches, and do its alarms tell when it is not?

``python -m benchmarks.stability --out FOLDER``: trains a small Primus on 200 phantoms once for each variant and seed, each on one core.
Unhealthy variants end at their first alarm. Whatever has its result in the folder is not trained again, so that an interrupted study
goes on and a larger one reuses the former.
At the end the folder holds summary.json, summary.md and stability.png.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import phantoms
from benchmarks.common import make_plan
from benchmarks.stability_figure import draw
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import read_json, write_json, write_text
from nnssl_ext.core.plan import Plan
from nnssl_ext.nn.health import rank_me, singular_values
from nnssl_ext.planners import primus
from nnssl_ext.trainers.base import SSLTrainer
from nnssl_ext.trainers.config import parse_overrides
from nnssl_ext.trainers.dinov2 import DINOv2Trainer
from nnssl_ext.trainers.pictures import evaluating
from nnssl_ext.trainers.sinks import VARIABLE, read_metrics

METHOD: type[SSLTrainer] = DINOv2Trainer
PATCH, BATCH = (32, 32, 32), 16
EPOCHS = 20  # windows of 5 % of the run, each with its own record
ITERATIONS = 40  # optimiser steps of each
VARIANTS: dict[str, dict[str, Any]] = {
    "healthy": {},  # the method's own settings for a dataset of this size
    "hot": {"lr": 1e-2, "teacher_temperature": (0.04, 0.07), "temperature_ramp": 0.06, "freeze": 0},
    "no_centring": {"centring": "none"},
    "hot_teacher": {"teacher_temperature": (0.2, 0.2)},
}
VECTORS = 1024  # of which RankMe is taken
LOSSES = ("dino", "ibot")


def make_small_plan() -> Plan:
    """Primus nano with 64 tokens in a global crop and 8 in a local one."""
    network = replace(primus.network((1, 1, 1), PATCH, "nano", 1e3, BATCH), batch_size=BATCH)
    return make_plan(PATCH, "primus", network)


class Caught(Exception):
    """An alarm was raised."""


class Watched(METHOD):  # type: ignore[misc,valid-type]
    """Ends at its first alarm."""

    def initialize(self) -> None:
        super().initialize()
        self.caught, judge_epoch = False, self.health.epoch

        def watched(step: int, wait: float) -> tuple[dict[str, float], list[str]]:
            found, alarms_ = judge_epoch(step, wait)
            self.caught |= any("waits for data" not in text for text in alarms_)
            return found, alarms_

        self.health.epoch = watched  # type: ignore[method-assign]

    def schedule(self, step: int) -> None:
        if self.caught:
            raise Caught
        super().schedule(step)


def train(variant: str, seed: int, out: Path, iterations: int, base: dict[str, Any]) -> None:
    """One run and its result, `VARIANT_SEED.json`; what a former attempt left of it is thrown away.

    Args:
        base: hyper-parameters of all variants, where a variant has no other ones.
    """
    torch.set_num_threads(1)
    os.environ[VARIABLE] = "none"
    folder, data = out / f"{variant}_{seed}", out / "phantoms"
    shutil.rmtree(folder, ignore_errors=True)
    options = {"batch_size": BATCH, **base, **VARIANTS[variant], "epochs": EPOCHS, "iterations": iterations, "workers": 0, "seed": seed}
    store: Any = phantoms.PhantomStore(data)
    cls = METHOD if variant == "healthy" else Watched
    trainer = cls(make_small_plan(), "3d_fullres", METHOD.Config(**options), store, folder, family="primus")
    probe = phantoms.TokenProbe(data, PATCH)
    trainer.initialize()
    quality = {"random": judge(trainer, probe)}
    began, ended = time.process_time(), ""
    try:
        trainer.fit()
    except Caught:
        ended = "alarm"
    except UserError as error:
        ended = error.what
    seconds = time.process_time() - began
    quality["trained"] = judge(trainer, probe)
    token = trainer.backbone.strides[0]
    quality["intensities"] = {"knn_dice": probe.dice(probe.raw(token), token)}
    records = read_metrics(folder / "metrics.jsonl")
    result = {"variant": variant, "seed": seed, "method": METHOD.__name__, "options": options, "steps": trainer.next_step, "ended": ended}
    result |= {"cpu_seconds": round(seconds, 1), "armed": trainer.health.armed / iterations, "quality": quality, "records": records}
    write_json(out / f"{variant}_{seed}.json", result)


def judge(trainer: Any, probe: phantoms.TokenProbe) -> dict[str, float]:
    """Quality of the backbone that would be handed over, frozen."""
    backbone = trainer.transferred()
    with evaluating(trainer.model, backbone):
        tokens = probe.tokens(backbone)
        found = {"knn_dice": probe.dice(tokens, backbone.strides[0]), "patches_rank_me": rank(torch.cat([x.flatten(0, 1) for x in tokens]))}
        with torch.no_grad():
            found["summary_rank_me"] = rank(torch.cat([trainer.model.teacher.net.summary(x) for x in tokens]))
    return found


def rank(vectors: Tensor) -> float:
    """RankMe of vectors taken evenly."""
    return float(rank_me(singular_values(vectors[:: -(-len(vectors) // VECTORS)])))


def alarms(result: dict[str, Any]) -> list[tuple[int, str]]:
    """Epoch (counted from 1) and text of each alarm."""
    return [(record["epoch"] + 1, text) for record in result["records"] for text in record.get("alarms", ())]


def figures(result: dict[str, Any]) -> dict[str, float | None]:
    """What the summary tells of a run; None where it was not measured or not finite."""
    records = result["records"]
    found: dict[str, float | None] = {"skipped_steps": sum(r.get("health/skipped_steps") or 0 for r in records), "alarms": len(alarms(result))}
    for loss in LOSSES:
        for quarter in range(1, 5):
            at = quarter * EPOCHS // 4 - 1
            for name, key in (("KL", f"health/{loss}/KL"), ("CE", f"train/{loss}")):
                found[f"{loss} {name} at {25 * quarter} %"] = records[at].get(key) if at < len(records) else None
    for which, quality in result["quality"].items():
        found |= {f"{name} {which}": value for name, value in quality.items()}
    found["knn_dice gain"] = result["quality"]["trained"]["knn_dice"] - result["quality"]["random"]["knn_dice"]
    return found


def summarize(out: Path, variants: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Figures of all runs that are finished, per variant a list with a value for each seed."""
    summary: dict[str, Any] = {}
    for variant in variants:
        results = [read_json(path) for seed in seeds if (path := out / f"{variant}_{seed}.json").is_file()]
        if results:
            values = [figures(result) for result in results]
            summary[variant] = {"seeds": [result["seed"] for result in results], "options": results[0]["options"]}
            summary[variant] |= {"ended": [result["ended"] for result in results], "alarms_at": [alarms(result) for result in results]}
            summary[variant] |= {"cpu_seconds_per_step": [round(result["cpu_seconds"] / max(1, result["steps"]), 3) for result in results]}
            summary[variant]["figures"] = {name: [value[name] for value in values] for name in values[0]}
    return summary


def table(summary: dict[str, Any]) -> str:
    """Markdown: a row for each figure, a column for each variant, median and range over the seeds."""
    variants = list(summary)
    lines = ["| | " + " | ".join(f"{v} ({len(summary[v]['seeds'])} seeds)" for v in variants) + " |", "|---" * (1 + len(variants)) + "|"]
    for name in summary[variants[0]]["figures"]:
        cells = [_cell(summary[variant]["figures"].get(name, [])) for variant in variants]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.median(known):.3g} ({min(known):.3g} to {max(known):.3g})"


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.stability", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help=f"steps of each of the {EPOCHS} windows")
    parser.add_argument("-o", metavar="KEY=VALUE", nargs="+", default=[], help="hyper-parameters of all variants, where a variant has no other ones")
    parser.add_argument("--single", action="store_true", help="train the one variant and seed in this process")
    options = parser.parse_args()
    out = options.out.resolve()
    if options.single:
        train(options.variants[0], options.seeds[0], out, options.iterations, parse_overrides(METHOD.Config, options.o))
        return 0
    phantoms.make(out / "phantoms", options.jobs)
    missing = [(variant, seed) for seed in options.seeds for variant in options.variants if not (out / f"{variant}_{seed}.json").is_file()]
    with ThreadPoolExecutor(options.jobs) as pool:
        codes = list(pool.map(partial(_child, out=out, more=["--iterations", str(options.iterations), *(["-o", *options.o] if options.o else [])]), missing))
    summary = summarize(out, options.variants, options.seeds)
    write_json(out / "summary.json", summary)
    write_text(out / "summary.md", table(summary))
    draw(out / "stability.png", {variant: [read_json(out / f"{variant}_{seed}.json") for seed in found["seeds"]] for variant, found in summary.items()})
    print(table(summary))
    return int(any(codes))


def _child(run: tuple[str, int], out: Path, more: Sequence[str]) -> int:
    """Train in a process of its own, on one core; what it says goes to VARIANT_SEED.log."""
    variant, seed = run
    command = [sys.executable, "-m", "benchmarks.stability", "--single", "--out", str(out), "--variants", variant, "--seeds", str(seed), *more]
    one_core = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    with open(out / f"{variant}_{seed}.log", "w", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, **one_core}, check=False)
    print(f"{variant}, seed {seed}: {'done' if code.returncode == 0 else f'failed, see {log.name}'}", flush=True)
    return code.returncode


if __name__ == "__main__":
    sys.exit(main())
