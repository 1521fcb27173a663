"""Does cross-view completion read the second view? Validation loss with the true second view against that of another sample, at the same offsets.

A small Primus is trained on crops of 32^3 voxels of phantoms, once for each of three seeds, on one thread. ``BENCHMARK_DATA`` names the
folder of the phantoms, which are made where they are missing. A ratio above 1 says that the true view helps.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import phantoms
from benchmarks.common import Result, make_plan
from nnssl_ext.core.plan import Plan
from nnssl_ext.data.loader import Batch
from nnssl_ext.planners import primus
from nnssl_ext.trainers.croco import CroCo3DTrainer
from nnssl_ext.trainers.pictures import evaluating
from nnssl_ext.trainers.sinks import VARIABLE

PATCH, BATCH = (32, 32, 32), 8
SIZE, SPACING = 64, 3.0  # voxels per edge of a phantom, mm
SEEDS, STEPS, QUICK_STEPS = 3, 300, 20
OPTIONS: dict[str, Any] = {"decoder_depth": 2, "decoder_width": 96, "lr": 3e-3}  # a decoder as wide as the encoder, the rate of a short run
BATCHES = 16  # of validation subjects


def small_plan() -> Plan:
    network = replace(primus.network((SPACING,) * 3, PATCH, "nano", 1e3, BATCH), batch_size=BATCH)
    plan = make_plan(PATCH, "primus", network)
    configuration = replace(plan.configurations["3d_fullres"], spacing=(SPACING,) * 3)
    return replace(plan, configurations={"3d_fullres": configuration})


def train(seed: int, data: Path, steps: int, folder: Path, **options: Any) -> CroCo3DTrainer:
    """A trained model."""
    settings = {"epochs": 1, "iterations": steps, "val_iterations": 1, "batch_size": BATCH, "workers": 0, "seed": seed, **OPTIONS, **options}
    store: Any = phantoms.PhantomStore(data)
    trainer = CroCo3DTrainer(small_plan(), "3d_fullres", CroCo3DTrainer.Config(**settings), store, folder)
    trainer.fit()
    return trainer


def other_second(batch: Batch) -> Batch:
    """The images of the second views passed on to the next sample, with everything else as it was."""
    second = batch["second"]
    return {**batch, "second": replace(second, image=second.image.roll(1, 0))}


def no_second(batch: Batch) -> Batch:
    """Second views without content."""
    second = batch["second"]
    return {**batch, "second": replace(second, image=torch.zeros_like(second.image))}


VIEWS = {"true": lambda batch: batch, "shuffled": other_second, "zero": no_second}


@torch.no_grad()
def losses(trainer: CroCo3DTrainer) -> dict[str, float]:
    """Mean validation loss by what the second view is."""
    data, sums = trainer._dataset(trainer.val_cases, "val"), dict.fromkeys(VIEWS, 0.0)
    with evaluating(trainer.model):
        for number in range(BATCHES):
            batch = data[number]
            for name, changed in VIEWS.items():
                sums[name] += float(trainer.step(trainer.model, changed(batch))["total"]) / BATCHES
    return sums


@contextmanager
def single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(quick: bool) -> Result:
    steps, found, seconds = QUICK_STEPS if quick else STEPS, [], []
    with tempfile.TemporaryDirectory() as scratch, single_thread():
        os.environ[VARIABLE] = "none"
        data = Path(os.environ.get("BENCHMARK_DATA", Path(scratch) / "phantoms"))
        phantoms.make(data, size=SIZE, spacing=SPACING)
        for seed in range(SEEDS):
            began = time.process_time()
            found.append(losses(train(seed, data, steps, Path(scratch) / str(seed))))
            seconds.append(time.process_time() - began)
            print(f"seed {seed}: " + ", ".join(f"{name} {value:.4f}" for name, value in found[-1].items()) + f", {seconds[-1]:.0f} CPU-s", flush=True)
    ratios = [each["shuffled"] / each["true"] for each in found]
    middle = {name: sorted(each[name] for each in found)[len(found) // 2] for name in VIEWS}
    detail = {"seeds": SEEDS, "steps": steps, "losses": found, "cpu_s": [round(value) for value in seconds]}
    return Result(
        math.exp(sum(map(math.log, ratios)) / SEEDS), min(ratios), max(ratios), middle["true"], middle["shuffled"], "shuffled second views", "loss", detail
    )
