"""PCRLv2: crops of one place are compared and restored at every scale of a decoder without skips."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_ext.core.plan import Plan
from nnssl_ext.data.augment import DINO
from nnssl_ext.data.corrupt import shuffle
from nnssl_ext.data.loader import Batch
from nnssl_ext.data.overlapping import CorruptedOverlap, OverlappingCrops
from nnssl_ext.data.views import ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.cosine import negative_cosine
from nnssl_ext.nn.precision import wide
from nnssl_ext.nn.skipless import SkiplessUNet
from nnssl_ext.nn.tokens import enlarge
from nnssl_ext.planners.primus import local_crop
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.config import AT_LEAST_ONE, check_several
from nnssl_ext.trainers.optim import Recipe
from nnssl_ext.trainers.pictures import volume_rows
from nnssl_ext.trainers.schedules import cosine

IOU = (0.3, 1.0)  # of the large crops; the authors' code
LARGE, SMALL = (0.9, 1.25), (0.5, 1.0)  # zoom of large and of small crops; 1.25 / 0.9 leaves an IoU of 0.3 possible
SHUFFLED, WINDOW = 0.2, 8  # share of a large crop's voxels that are shuffled, at most; voxels along a window's edge


class PCRLv2Trainer(SSLTrainer):
    """Restores a corrupted crop from the deepest map alone, and says the same of all crops of its surroundings, at every scale of the decoder.

    L = MSE + cs(1, 2) + beta * MSE_mid + 1/12 sum_l [cs(1, l) + cs(2, l)] over six small crops l, where MSE is the error of the
    first large crop restored in full and MSE_mid the mean of the scales', beta falls from 1 to 0 by half a cosine, and
    cs(a, b) = -1/2 [cos(p_a, z_b) + cos(p_b, z_a)] is the mean over the scales, z without gradient.

    Source: Zhou et al. 2023, arXiv:2301.00772.
    """

    needs = (frozenset({"pyramid", "decoder"}),)
    recipes: ClassVar[dict[str, Recipe]] = {"resenc": Recipe("sgd", 1e-2, 1e-4, 0.0, 12.0, sgd_momentum=0.9)}
    citation = (
        "Zhou, H.-Y., Lu, C., Chen, C., Yang, S., & Yu, Y. (2023). A unified visual information preservation framework for self-supervised "
        "pre-training in medical image analysis. IEEE TPAMI, 45(7), 8020-8035."
    )

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        locals: int = field(default=6, metadata=AT_LEAST_ONE)  # small crops around the large ones

    def __init__(
        self, plan: Plan, configuration: str, config: Config, store: CaseStore, folder: Path | str, *, family: str | None = None, device: str = "cpu"
    ) -> None:
        super().__init__(plan, configuration, config, store, folder, family=family, device=device)
        if config.batch_size is None:
            self.batch_size = max(2, self.batch_size // 3)  # two large crops and six of an eighth
        check_several(self.batch_size * self.ranks, type(self).__name__)

    def views(self) -> ViewSpec:
        patch = self.config_plan.patch_size
        small = local_crop(patch, self.config_plan.in_volume(self.network_plan.cell))
        return CorruptedOverlap(OverlappingCrops(patch, small, self.config.locals, IOU, LARGE, SMALL, intensity=DINO), corrupt)

    def build(self, backbone: Backbone) -> nn.Module:
        return SkiplessUNet(backbone)

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        small = torch.stack([view.image for name, view in batch.items() if name.startswith("local_")])
        vectors, (*middle, restored) = model(torch.stack((batch["global_0"].image, batch["global_1"].image)), small)
        self.health.add("prediction", vectors[0][1].flatten(0, 1))
        target = wide(batch["target"].image)
        beta = cosine(self.next_step, self.total_steps, 1.0, 0.0)
        losses = {
            "restoration": error(restored, target),
            "middle": torch.stack([error(image, target) for image in middle]).mean(),
            "global": torch.stack([agreement(scale, 0, 1) for scale in vectors]).mean(),
            "local": torch.stack([agreement(scale, one, other) for scale in vectors for one in (0, 1) for other in range(2, scale.shape[1])]).mean(),
        }
        return {"total": losses["restoration"] + losses["global"] + beta * losses["middle"] + losses["local"], **losses}

    def picture(self, batch: Batch) -> list[dict[str, np.ndarray]]:
        target, seen = batch["target"].image[:2], batch["global_0"].image[:2]
        maps, model = self.model.maps(seen), self.model
        scale = max(0, len(maps) - 2)
        coarser = enlarge(model.restorations[scale](maps[scale]), target.shape[2:])
        shown = {"crop": target, "seen": seen, "restored, coarser": coarser, "restored": model.last(maps[-1])}
        return volume_rows({**shown, "second crop": batch["global_1"].image[:2], "small crop": batch["local_0"].image[:2]})


def corrupt(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The voxels of random windows are permuted."""
    return shuffle(image, rng, max(1, round(SHUFFLED * image[0].size / WINDOW**3)), (WINDOW, WINDOW))


def error(restored: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of an image (B, C, z, y, x) to the means of the target's voxels in each of its own."""
    factor = [n // m for n, m in zip(target.shape[2:], restored.shape[2:])]
    return (wide(restored) - F.avg_pool3d(target, factor)).square().mean()


def agreement(vectors: Tensor, a: int, b: int) -> Tensor:
    """cs of the views a and b of projections and predictions (2, views, B, D); from 1 to -1."""
    z, p = vectors
    return (negative_cosine(p[a], z[b]) + negative_cosine(p[b], z[a])) / 2
