"""Batches of two crops from compressed cases on disk, against decompressing the whole case and cutting the crop out of it.

One thread. `detail`: patches per CPU second by edge of the patch, with crops anywhere and where the body is, and the
figures recorded for nnssl's loader elsewhere.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import Result, spread, summarize
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.data.loader import StepDataset
from nnssl_ext.data.sampling import random_box, whole
from nnssl_ext.data.views import Crop, View
from nnssl_ext.evaluation.phantom import make_phantom
from nnssl_ext.preprocessing.store import CaseStore, pack_body, write_case

PEER = "plain loader (whole case decompressed, then cropped)"
EDGES = (64, 96)
BATCH = 2
NNSSL_PATCHES_PER_CPU_S = {64: 298, 96: 116}  # recorded, not run here


class WholeCase:
    """The plain way to a mirrored crop."""

    def __init__(self, edge: int) -> None:
        self.size = (edge,) * 3

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        box = random_box(whole(store.shape(case)), self.size, rng)
        crop = store.read(case)[(slice(None), *(slice(*side) for side in box))]
        return {"image": View(np.ascontiguousarray(np.flip(crop, np.flatnonzero(rng.integers(0, 2, 3)) + 1)), np.eye(3, 4))}


def make_store(folder: Path, edge: int, quick: bool) -> CaseStore:
    """Normalised CT phantoms in blocks for patches of this edge."""
    shape = (112, 112, 112) if quick else (160, 176, 176)
    for index in range(2 if quick else 3):
        image = make_phantom(0, index, shape, (2.0, 1.6, 1.6), "CT").image.astype(np.float32)
        body, geometry = image > -500, Geometry(shape, (2.0, 1.6, 1.6))
        image = ((image - image.mean()) / image.std())[None]
        info = {"subject": f"s{index}", "stored": geometry.as_dict(), "fill": [float(image.min())], "body": pack_body(body, shape)}
        write_case(folder, f"case{index}", image, info, (edge,) * 3)
    return CaseStore(folder)


def patches_per_cpu_s(dataset: StepDataset, steps: int, first: int = 0) -> float:
    """Over some consecutive batches."""
    began = time.process_time()
    for step in range(first, first + steps):
        dataset[step]
    return steps * dataset.batch_size / (time.process_time() - began)


def in_turn(work: dict[str, Callable[[int], float]], repetitions: int) -> dict[str, list[float]]:
    """Seconds per patch of each, measured one after the other in turn; one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for function in work.values():
            function(0)
        rounds = [[1 / function(i) for function in work.values()] for i in range(1, repetitions + 1)]
        return {name: list(values) for name, values in zip(work, zip(*rounds))}
    finally:
        torch.set_num_threads(threads)


def run(quick: bool) -> Result:
    ours: list[float] = []
    peer: list[float] = []
    detail: dict[str, object] = {"threads": 1, "bar_over_nnssl": 2, "nnssl_recorded": NNSSL_PATCHES_PER_CPU_S}
    for edge in EDGES:
        with tempfile.TemporaryDirectory() as folder:
            store = make_store(Path(folder), edge, quick)
            specs = {"ours": Crop((edge,) * 3, body=0.0), "ours, body-aware": Crop((edge,) * 3), "peer": WholeCase(edge)}
            data = {name: StepDataset(store, spec, range(len(store)), 0, BATCH) for name, spec in specs.items()}
            steps = 4 if quick else 20
            times = in_turn({name: lambda i, d=d, s=steps: patches_per_cpu_s(d, s, i * s) for name, d in data.items()}, 2 if quick else 5)
        detail[f"patches_per_cpu_s_{edge}"] = {name: round(1 / statistics.median(values), 1) for name, values in times.items()}
        detail[f"over_nnssl_{edge}"] = spread(1 / value / NNSSL_PATCHES_PER_CPU_S[edge] for value in times["ours"])
        ours += times["ours"]
        peer += times["peer"]
    return summarize(ours, peer, PEER, "CPU-s per patch", detail)
