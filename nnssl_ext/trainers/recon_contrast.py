"""Reconstruction of a crop from two corruptions of it, weighted by how well these are told from those of other crops."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch.nn.functional as F
from torch import nn

from nnssl_ext.core.plan import Plan
from nnssl_ext.data.corrupt import drop_holes, keep_holes, shuffle
from nnssl_ext.data.corrupted import CorruptedCrop
from nnssl_ext.data.loader import Batch, subject_numbers
from nnssl_ext.data.views import Crop, ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.contrastive import nt_xent, rank_mean
from nnssl_ext.nn.pixel_head import Reconstruction
from nnssl_ext.nn.precision import wide
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.config import check_several
from nnssl_ext.trainers.optim import RECIPES, Recipe
from nnssl_ext.trainers.pictures import volume_rows

SHUFFLED = 0.8  # share of the corruptions that are shuffled, too


class ReconContrastTrainer(SSLTrainer):
    """Reconstructs a crop from two corruptions of it; the error counts more the less the two results are alike among all of a batch.

    L = r + c * r, where r = mean |x1 - x| is the error of the first reconstruction, and c the contrast (NT-Xent) of the first and
    the second one, as vectors of voxels. The second one is not compared with x: it enters through c alone.

    Source: ViTAutoEnc and its tutorial "vit_unetr_ssl" of MONAI, arXiv:2211.02701; Chen et al. 2020, arXiv:2002.05709 (NT-Xent).
    """

    default_family = "primus"
    trains_decoder = True
    transfers_decoder = False  # as in the source
    recipes: ClassVar[dict[str, Recipe]] = dict.fromkeys(RECIPES, Recipe("adamw", 1e-4, 0.0, 0.0, 12.0, (0.9, 0.999)))
    citation = (
        "Cardoso, M. J., Li, W., Brown, R., Ma, N., Kerfoot, E., Wang, Y., ... Feng, A. (2022). "
        "MONAI: An open-source framework for deep learning in healthcare. arXiv:2211.02701."
    )

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        temperature: float = 0.005  # of the contrast

    def __init__(
        self, plan: Plan, configuration: str, config: Config, store: CaseStore, folder: Path | str, *, family: str | None = None, device: str = "cpu"
    ) -> None:
        super().__init__(plan, configuration, config, store, folder, family=family, device=device)
        check_several(self.batch_size * self.ranks, type(self).__name__)

    def views(self) -> ViewSpec:
        return CorruptedCrop(Crop(self.config_plan.patch_size), corrupt, versions=2)

    def build(self, backbone: Backbone) -> nn.Module:
        return Reconstruction(backbone, backbone.channels)

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        target = batch["target"]
        first, second = model(batch["image_0"].image), model(batch["image_1"].image)
        error = rank_mean(F.l1_loss(wide(first), target.image))
        contrast = nt_xent(first.flatten(1), second.flatten(1), self.config.temperature, subject_numbers(self.store, target.cases))
        return {"total": error + contrast * error, "reconstruction": error, "contrast": contrast}

    def picture(self, batch: Batch) -> list[dict[str, np.ndarray]]:
        seen = [batch[name].image[:2] for name in ("image_0", "image_1")]
        made = [self.model(image) for image in seen]
        return volume_rows({"crop": batch["target"].image[:2], "corrupted": seen[0], "restored": made[0], "corrupted 2": seen[1], "restored 2": made[1]})


def corrupt(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Six boxes become noise or, half of the time, all but six larger ones; then the voxels of ten windows of 8^3 are shuffled."""
    holed = drop_holes(image, rng) if rng.random() < 0.5 else keep_holes(image, rng)
    return shuffle(holed, rng) if rng.random() < SHUFFLED else holed
