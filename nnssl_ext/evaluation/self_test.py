"""A training of a few seconds on noise: plan, steps, checkpoint, loading."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Box, Geometry, box_slices
from nnssl_ext.planners.planner import Planner
from nnssl_ext.trainers.checkpoint import load_checkpoint
from nnssl_ext.trainers.mae import MAETrainer
from nnssl_ext.trainers.sinks import VARIABLE

SHAPE, SPACING, STEPS = (32, 32, 32), (3.0, 3.0, 3.0), 3


class NoiseStore:
    """The reading side of a case store: white noise, no files."""

    def __init__(self, cases: int) -> None:
        self.arrays = np.random.default_rng(0).standard_normal((cases, 1, *SHAPE), dtype=np.float32)

    def __len__(self) -> int:
        return len(self.arrays)

    def shape(self, case: int) -> tuple[int, ...]:
        return SHAPE

    def subject(self, case: int) -> str:
        return str(case)

    def fill(self, case: int) -> list[float]:
        return [0.0]

    def geometry(self, case: int) -> Geometry:
        return Geometry(SHAPE, SPACING)

    def body(self, case: int) -> np.ndarray:
        return np.ones([-(-n // 8) for n in SHAPE], bool)

    def read(self, case: int, box: Box | None = None) -> np.ndarray:
        array: np.ndarray = self.arrays[case]
        return array.copy() if box is None else array[box_slices(box)].copy()

    def verify(self, case: int) -> None:
        pass

    def data_hash(self) -> str:
        return "0" * 64


def _fingerprint(shape: Sequence[int]) -> dict[str, object]:
    case = {"modalities": ["CT"], "shape": list(shape), "shape_after_crop": list(shape), "spacing": list(SPACING)}
    values = {"mean": 0.0, "std": 1.0, "median": 0.0, "min": -4.0, "max": 4.0, "percentile_00_5": -2.6, "percentile_99_5": 2.6, "voxels": 1000}
    cases = {str(number): {**case, "subject": str(number)} for number in range(4)}
    return {"schema_version": 1, "dataset_name": "Dataset999_SelfTest", "channels": 1, "cases": cases, "intensities": {"CT": values}, "failed": {}}


def train_a_little(device: str) -> str:
    """Train for three steps, write checkpoints, read the last one back.

    Args:
        device: "cpu" or "cuda".

    Returns:
        what was done, in words.

    Raises:
        UserError: the loss is not finite, or the checkpoint does not hold the trained weights.
    """
    plan = Planner(_fingerprint(SHAPE), memory_gb=0.5).plan("nnsslPlans")
    config = MAETrainer.Config(epochs=1, iterations=STEPS, batch_size=1, workers=0)
    with tempfile.TemporaryDirectory() as folder, _silent():
        trainer = MAETrainer(plan, "3d_fullres", config, NoiseStore(4), folder, device=device)  # type: ignore[arg-type]
        trainer.fit()
        weights = load_checkpoint(Path(folder) / "checkpoint_final.pth")["network_weights"]
        loss = json.loads((Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["train/total"]
    if loss is None or not math.isfinite(loss):
        raise UserError(f"the loss of the self-test is not finite on {device}")
    if not all(torch.equal(value, weights[name].to(value.device)) for name, value in trainer.transferred().network_weights().items()):
        raise UserError(f"the checkpoint of the self-test does not hold the weights that were trained on {device}")
    return f"{STEPS} steps of MAETrainer, loss {loss:.3f}, checkpoint written and read"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing on the terminal, and nothing sent to the servers that the user's runs report to."""
    former = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "none"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if former is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = former
