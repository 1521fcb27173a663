"""SimSiam on pairs of crops with a controlled IoU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from nnssl_ext.core.plan import Plan
from nnssl_ext.data.augment import NNUNET
from nnssl_ext.data.iou_pairs import IoUPair
from nnssl_ext.data.loader import Batch
from nnssl_ext.data.views import ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.cosine import negative_cosine
from nnssl_ext.nn.projector import normalized_mlp
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.config import AT_LEAST_ONE, SHARE, check_interval, check_several
from nnssl_ext.trainers.optim import Recipe, parameter_groups, set_rates
from nnssl_ext.trainers.pair_pictures import pair_rows
from nnssl_ext.trainers.pictures import Rows
from nnssl_ext.trainers.schedules import cosine

FEWEST = 16  # pairs of all processes from which moments of a batch are worth something
PREDICTOR = "predictor"  # name of its parameter groups


class SimSiamIoUTrainer(SSLTrainer):
    """Predicts the projection of one crop from the other one of the same case; the IoU of the two lies in an interval.

    loss = (D(p1, z2) + D(p2, z1)) / 2 with D = -cos, p the prediction from a projection z, and no gradient through z. Nothing
    but the predictor and the stopped gradient keeps all projections from becoming equal. The learning rate of the predictor
    does not decay.

    Source: Chen & He 2021, arXiv:2011.10566.
    """

    recipes: ClassVar[dict[str, Recipe]] = {"resenc": Recipe("sgd", 0.05, 1e-4, 0.0, 12.0, sgd_momentum=0.9)}  # section 4; the rate is of 256 pairs
    citation = "Chen, X., & He, K. (2021). Exploring simple Siamese representation learning. CVPR."

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        iou: tuple[float, ...] = field(default=(0.3, 0.6), metadata=SHARE)  # of the two crops, lowest and highest; 0,1: crops from anywhere
        iou_parts: int = field(default=1, metadata=AT_LEAST_ONE)  # of the interval that are equally frequent; 1: all pairs are, hence low IoU more frequent
        hidden: int = field(default=2048, metadata=AT_LEAST_ONE)  # width of all three layers of the projector
        bottleneck: int = field(default=512, metadata=AT_LEAST_ONE)  # width of the predictor's hidden layer

    def __init__(
        self, plan: Plan, configuration: str, config: Config, store: CaseStore, folder: Path | str, *, family: str | None = None, device: str = "cpu"
    ) -> None:
        super().__init__(plan, configuration, config, store, folder, family=family, device=device)
        self.pairs = self.batch_size * self.ranks
        check_several(self.pairs, type(self).__name__)
        check_interval(config.iou, "iou")
        if config.lr is None and self.recipe.optimizer == "sgd":
            self.recipe = replace(self.recipe, lr=self.recipe.lr * self.pairs * config.accumulate / 256)

    def initialize(self) -> None:
        super().initialize()
        if self.rank == 0 and self.pairs < FEWEST:
            print(f"warning: SimSiam normalises over the pairs of a step, and {self.pairs} are few: -o batch_size={FEWEST} or more processes help")

    def views(self) -> ViewSpec:
        return IoUPair(self.config_plan.patch_size, self.config.iou, intensity=NNUNET, parts=self.config.iou_parts)

    def build(self, backbone: Backbone) -> nn.Module:
        return Siamese(backbone, self.config.hidden, self.config.bottleneck)

    def param_groups(self, model: nn.Module) -> list[dict]:
        encoder: nn.Module = nn.ModuleList([model.backbone, model.projector])  # type: ignore[list-item]
        groups = [parameter_groups(part, self.recipe.weight_decay, self.recipe.optimizer == "adamw") for part in (encoder, model.predictor)]  # type: ignore[arg-type]
        return groups[0] + [{**group, "name": PREDICTOR} for group in groups[1]]

    def schedule(self, step: int) -> None:
        set_rates(self.optimizer, cosine(step, self.total_steps, self.recipe.lr, 0.0, self.warmup_steps))
        for group in self.optimizer.param_groups:
            if group.get("name") == PREDICTOR:
                group["lr"] = self.recipe.lr

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        z, p = model(torch.stack((batch["first"].image, batch["second"].image)))
        self.health.add("projection", z.flatten(0, 1))
        self.health.add("prediction", p.flatten(0, 1))  # normalised projections have a mean of zero, and look spread even if equal up to rounding
        return {"total": (negative_cosine(p[0], z[1]) + negative_cosine(p[1], z[0])) / 2}

    def picture(self, batch: Batch) -> Rows:
        return pair_rows(self.store, batch["first"], batch["second"])


class Siamese(nn.Module):
    """Backbone, projector and predictor; both crops pass through the same ones, each normalised among its own kind."""

    def __init__(self, backbone: Backbone, hidden: int, bottleneck: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = normalized_mlp((backbone.widths[-1], hidden, hidden, hidden), last=True)
        self.predictor = normalized_mlp((hidden, bottleneck, hidden), last=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (2, B, C, z, y, x) to projections and predictions, both (2, B, hidden)."""
        z = [self.projector(part) for part in self.backbone.pooled(x.flatten(0, 1)).chunk(2)]
        return torch.stack(z), torch.stack([self.predictor(part) for part in z])
