"""Volume Fusion: segmentation of how much of another subject is mixed into a crop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_ext.data.fusion import FusionPair
from nnssl_ext.data.loader import Batch
from nnssl_ext.data.partners import training_partners
from nnssl_ext.data.views import Crop, ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.pixel_head import Reconstruction
from nnssl_ext.nn.segmentation_losses import dice_ce
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.pictures import volume_rows


class VolumeFusionTrainer(SSLTrainer):
    """Mixes crops of two subjects in random boxes, with one of a few weights each, and segments the weights.

    x = a F + (1 - a) B with a = k / (classes - 1): class k = 0 is the background B, the last class the foreground F. Both are
    training cases, or a validation case as foreground and a training case as background: few datasets hold out two subjects.

    Source: Wang et al. 2023, arXiv:2306.16925.
    """

    trains_decoder = True
    citation = (
        "Wang, G., Wu, J., Luo, X., Liu, X., Li, K., & Zhang, S. (2023). MIS-FM: 3D medical image segmentation using foundation models pretrained on "
        "a large-scale unannotated dataset. arXiv:2306.16925."
    )

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        classes: int = field(default=5, metadata={"range": (2, math.inf)})  # weights, evenly from 0 to 1

    def views(self) -> ViewSpec:
        partners = training_partners(self.store, self.config.seed, type(self).__name__, self.plan.dataset_name)
        return FusionPair(Crop(self.config_plan.patch_size), partners, self.config.classes)

    def build(self, backbone: Backbone) -> nn.Module:
        return Reconstruction(backbone, self.config.classes)

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        return {"total": dice_ce(model(self.fused(batch)), batch["label"].image[:, 0].long())}

    def fused(self, batch: Batch) -> Tensor:
        """What the network sees, (B, C, z, y, x)."""
        weight = batch["label"].image / (self.config.classes - 1)
        return torch.lerp(batch["background"].image, batch["foreground"].image, weight)

    def picture(self, batch: Batch) -> list[dict[str, np.ndarray]]:
        fused, label = self.fused(batch)[:2], batch["label"].image[:2]
        foreground, background = batch["foreground"].image[:2], batch["background"].image[:2]
        rows = volume_rows({"foreground": foreground, "background": background, "mixture": fused})
        for row, true, predicted in zip(rows, label, self.model(fused).argmax(1, keepdim=True)):
            for caption, classes in (("classes", true), ("prediction", predicted)):
                row[caption] = classes[0, ..., None].expand(-1, -1, -1, 3).float().cpu().numpy() / (self.config.classes - 1)
        return rows
