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
# U-Nets with AdamW: SGD with momentum 0.99 has hardly begun after a few hundred steps. One learning rate for all methods of a family; DINOv2 has its own.
UNET, TRANSFORMER = {"optimizer": "adamw", "lr": 3e-3}, {"optimizer": "adamw", "lr": 1e-3}
LABELS = 2  # labelled volumes to fine-tune with
FINE_TUNING = {
    "resenc": FineTuning("nnsslResEncTrainer_short", epochs=40, iterations=10, batch=2),
    "primus": FineTuning("nnsslPrimusTrainer_short", epochs=45, iterations=10, batch=4),
    "segformer3d": FineTuning("nnsslSegFormerTrainer_short", epochs=45, iterations=10, batch=4),
}
CLUSTERED = {"PixelClusterTrainer": "MAETrainer"}  # method: whose features give it its clusters
SUITE = (  # measured seconds per step on one thread
    Entry("MAETrainer", "resenc", 450, 4, UNET),  # 0.22
    Entry("SparkMAETrainer", "resenc", 300, 4, UNET),  # 0.34
    Entry("ModelsGenesisTrainer", "resenc", 425, 4, UNET),  # 0.24
    Entry("VolumeFusionTrainer", "resenc", 425, 4, UNET),  # 0.23
    Entry("SwinUNETRPretrainTrainer", "resenc", 165, 4, UNET),  # 0.60
    Entry("MAETrainer", "primus", 1800, 8, TRANSFORMER),  # 0.055
    Entry("SimMIMTrainer", "primus", 2000, 8, TRANSFORMER),  # 0.048
    Entry("ReconContrastTrainer", "primus", 800, 8, TRANSFORMER),  # 0.12
    Entry("DINOv2Trainer", "primus", 340, 16),  # 0.29
    Entry("SimCLRTrainer", "resenc", 110, 8, UNET),  # 0.9
    Entry("SimCLRTrainer", "primus", 550, 16, TRANSFORMER),  # 0.18
    Entry("SimSiamIoUTrainer", "primus", 400, 16, TRANSFORMER),  # 0.25
    Entry("DINOIoUTrainer", "primus", 400, 16),  # 0.2
    Entry("VoCoTrainer", "resenc", 400, 4, UNET),  # 0.25
    Entry("VoCoTrainer", "primus", 1300, 4, TRANSFORMER),  # 0.075
    Entry("PCRLv2Trainer", "resenc", 150, 4, UNET),  # 0.64
    Entry("GVSLTrainer", "resenc", 145, 4, UNET),  # 0.68
    Entry("PatchClusterTrainer", "resenc", 350, 4, UNET),  # 0.27
    Entry("PatchClusterTrainer", "primus", 1200, 8, TRANSFORMER),  # 0.08
    Entry("PixelClusterTrainer", "resenc", 300, 4, UNET),  # 0.33
    Entry("MultiMAETrainer", "primus", 850, 8, TRANSFORMER),  # 0.118
    Entry("CroCo3DTrainer", "primus", 900, 8, {**TRANSFORMER, "decoder_depth": 2, "decoder_width": 96}),  # 0.11; 1.5 with a decoder as large as published
    Entry("BilateralDenseContrastTrainer", "resenc", 175, 4, UNET),  # 0.56
    Entry("RegistrationPretextTrainer", "resenc", 190, 4, UNET),  # 0.53
    Entry("MAETrainer", "segformer3d", 1750, 8, TRANSFORMER),  # 0.057
    Entry("SimMIMTrainer", "segformer3d", 1850, 8, TRANSFORMER),  # 0.054
)
