"""What the learning suite trains: methods, backbone families, hyper-parameters, steps.

Steps are fixed, so that figures can be reproduced; they were chosen from measured seconds per step for about 100 s on one idle core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

PATCH = 32  # voxels per edge in pretraining, fine-tuning and probing


@dataclass(frozen=True)
class Entry:
    """One pretraining.

    Args:
        method: name of the trainer class.
        family: backbone family.
        steps: optimiser steps.
        batch: volumes per step.
        options: hyper-parameters that differ from the method's defaults.
    """

    method: str
    family: str
    steps: int
    batch: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.method}_{self.family}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class FineTuning:
    """Quick fine-tuning of one backbone family, chosen by training from scratch alone.

    Args:
        trainer: nnU-Net trainer.
        epochs: steps of its learning-rate schedule.
        iterations: of each epoch.
        batch: patches per iteration.
    """

    trainer: str
    epochs: int
    iterations: int
    batch: int


EPOCHS = 5  # windows of a pretraining, each with its validation and its record
SHORT = {"optimizer": "adamw", "lr": 3e-3}  # U-Nets in a few hundred steps: SGD with momentum 0.99 has hardly begun by then
LABELS = 2  # labelled volumes to fine-tune with
FINE_TUNING = {
    "resenc": FineTuning("nnsslResEncTrainer_short", 15, 10, 4),
    "primus": FineTuning("nnsslPrimusTrainer_short", 30, 10, 4),
}
SUITE = (
    Entry("MAETrainer", "resenc", 400, 4, SHORT),
    Entry("MAETrainer", "primus", 1500, 8, {"lr": 1e-3}),
    Entry("DINOv2Trainer", "primus", 350, 16),
)
