"""``python -m benchmarks.dinov2_gpu``: training of DINOv2Trainer on a CUDA card, Primus-M, 96^3, bf16, with its loader.

Prints one JSON object per run, with and without torch.compile: samples and TFLOP per second, share of the time spent waiting
for data, and memory. By hand, on a machine with a card; no peer.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import make_plan
from benchmarks.dinov2 import gflop
from benchmarks.loader import make_store
from nnssl_ext.data.loader import batches
from nnssl_ext.planners import primus
from nnssl_ext.trainers.dinov2 import DINOv2Trainer

WARM_UP = 10  # steps, in which the compiler works, too


def throughput(store: Any, device: str, size: str, edge: int, *, batch: int, steps: int, workers: int, compiled: bool) -> dict[str, Any]:
    """Figures of `steps` optimiser steps after the warm-up.

    Args:
        store: cases that the loader reads.
        device: "cuda" or "cpu".
        size: of Primus.
        edge: of the global crops, voxels.
        batch: volumes per step, each with 2 global and 8 local crops.
    """
    network = primus.network((1, 1, 1), (edge,) * 3, size, 1e3, batch)
    config = DINOv2Trainer.Config(batch_size=batch, locals=8, freeze=0, workers=workers, compile=compiled)
    trainer = DINOv2Trainer(
        make_plan((edge,) * 3, "primus", replace(network, batch_size=batch)), "3d_fullres", config, store, tempfile.gettempdir(), device=device
    )
    trainer.initialize()
    data = trainer._dataset(list(range(len(store))), "train")
    loader = batches(data, 0, WARM_UP + steps, workers, pin=device == "cuda")
    trainer.waited = 0.0
    for step in range(WARM_UP):
        trainer._update(step, loader)
    began, trainer.waited = time.perf_counter(), 0.0
    for step in range(WARM_UP, WARM_UP + steps):
        trainer._update(step, loader)  # reads the losses from the device
    seconds, waited = time.perf_counter() - began, trainer.waited
    found: dict[str, Any] = {"device": device, "network": f"Primus {size}", "edge": edge, "batch": batch, "workers": workers, "compiled": compiled}
    found |= {"samples_per_s": round(batch * steps / seconds, 3), "data_wait_share": round(waited / seconds, 4)}
    if device == "cuda":
        found |= {"card": torch.cuda.get_device_name(), "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}
    if not compiled:
        work = gflop(lambda: trainer._update(WARM_UP + steps, repeat(data[0])), 1)
        found |= {"gflop_per_step": round(work, 1), "tflop_per_s": round(work * steps / seconds / 1e3, 2)}
    return found


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA card here", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), 96, quick=False)
        for batch, compiled in ((8, False), (32, False), (32, True)):
            torch.cuda.reset_peak_memory_stats()
            print(json.dumps(throughput(store, "cuda", "M", 96, batch=batch, steps=30, workers=12, compiled=compiled)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
