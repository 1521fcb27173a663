"""The pretraining of Swin UNETR: restore, tell the rotation, recognise the sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_ext.core.plan import Plan
from nnssl_ext.data.loader import Batch, subject_numbers
from nnssl_ext.data.spatial import NONE
from nnssl_ext.data.turned import TurnedPair, choose_turning, turns
from nnssl_ext.data.views import Crop, ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.contrastive import nt_xent
from nnssl_ext.nn.corruption import swap, turn
from nnssl_ext.nn.pixel_head import Reconstruction
from nnssl_ext.nn.precision import wide
from nnssl_ext.nn.projector import BatchNorm
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.config import AT_LEAST_ONE, SHARE, check_several
from nnssl_ext.trainers.optim import RECIPES, Recipe
from nnssl_ext.trainers.pictures import volume_rows


class SwinUNETRPretrainTrainer(SSLTrainer):
    """Two turned and corrupted versions of a crop: restore each, tell by how many quarter turns it is turned, tell the pair from other samples.

    Boxes of each version become noise, others show the voxels of another sample of the batch. The three losses are summed:
    mean absolute error to the turned clean crop, cross-entropy of the turns, NT-Xent of the two versions.

    Source: Tang et al. 2022, arXiv:2111.14791, section 3.
    """

    trains_decoder = True
    transfers_decoder = False  # as in the source
    recipes: ClassVar[dict[str, Recipe]] = dict.fromkeys(RECIPES, Recipe("adamw", 4e-4, 1e-5, 0.002, 1.0, (0.9, 0.999)))
    citation = (
        "Tang, Y., Yang, D., Li, W., Roth, H. R., Landman, B., Xu, D., Nath, V., & Hatamizadeh, A. (2022). "
        "Self-supervised pre-training of Swin transformers for 3D medical image analysis. CVPR."
    )

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        noise: float = field(default=0.3, metadata=SHARE)  # largest share of a version that becomes noise; the paper's 30 %
        swap: float = field(default=0.3, metadata=SHARE)  # largest share that shows another sample; the authors' code
        temperature: float = 0.5  # of the contrast; the authors' code
        contrast: int = field(default=512, metadata=AT_LEAST_ONE)  # channels that are contrasted; the authors' code

    def __init__(
        self, plan: Plan, configuration: str, config: Config, store: CaseStore, folder: Path | str, *, family: str | None = None, device: str = "cpu"
    ) -> None:
        super().__init__(plan, configuration, config, store, folder, family=family, device=device)
        check_several(self.batch_size, type(self).__name__)
        self.turning = choose_turning(self.config_plan.patch_size, self.config_plan.spacing, self.config_plan.in_volume(self.network_plan.cell))

    def views(self) -> ViewSpec:
        return TurnedPair(Crop(self.turning.size, NONE), self.turning, self.config.noise, self.config.swap)

    def build(self, backbone: Backbone) -> nn.Module:
        return ThreeHeads(backbone, self.config.contrast)

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        seen, clean, times = self._versions(batch)
        restored, rotation, vectors = model(seen)
        first, second = vectors.chunk(2)
        self.health.add("contrast", vectors)
        error = F.l1_loss(wide(restored), clean)
        told = F.cross_entropy(wide(rotation), times.to(rotation.device))
        contrast = nt_xent(first, second, self.config.temperature, subject_numbers(self.store, batch["target"].cases))
        return {"total": error + told + contrast, "reconstruction": error, "rotation": told, "contrast": contrast}

    def _versions(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What the network sees of all first, then of all second versions, (2B, C, z, y, x), what it has to restore, and their quarter turns (2B,)."""
        target, versions, plane = batch["target"], [batch["image_0"], batch["image_1"]], self.turning.plane
        seen = torch.cat([swap(version.image, version.mask, target.image) for version in versions])  # type: ignore[arg-type]
        times = torch.cat([turns(version.affine, target.affine, plane) for version in versions])
        return seen, turn(target.image.repeat(2, 1, 1, 1, 1), times, plane), times

    def picture(self, batch: Batch) -> list[dict[str, np.ndarray]]:
        seen, clean, _ = (part[:2] for part in self._versions(batch))
        return volume_rows({"turned crop": clean, "seen": seen, "reconstruction": self.model(seen)[0]})


class ThreeHeads(Reconstruction):
    """Backbone with reconstruction, and linear layers on the deepest map, averaged over the whole volume.

    Averages of a U-Net's map after InstanceNorm hardly differ between volumes: they are normalised over the batch, without which
    turns stay at chance.
    """

    def __init__(self, backbone: Backbone, contrast: int) -> None:
        super().__init__(backbone, backbone.channels)
        self.norm = BatchNorm(backbone.widths[-1], affine=False) if backbone.instance_norm else nn.Identity()
        self.rotation = nn.Linear(backbone.widths[-1], 4)
        self.contrast = nn.Linear(backbone.widths[-1], contrast)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Image (B, C, z, y, x), logits of the quarter turns (B, 4), vectors (B, contrast)."""
        maps = self.backbone.pyramid(x)
        pooled = self.norm(maps[-1].flatten(2).mean(2))
        return self.from_maps(maps), self.rotation(pooled), self.contrast(pooled)
