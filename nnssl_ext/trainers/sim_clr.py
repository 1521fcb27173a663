"""SimCLR: two overlapping crops are told from those of all other subjects."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nnssl_ext.core.plan import Plan
from nnssl_ext.data.augment import NNUNET, Chance
from nnssl_ext.data.iou_pairs import IoUPair
from nnssl_ext.data.loader import Batch, subject_numbers
from nnssl_ext.data.turned import choose_turning
from nnssl_ext.data.views import ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.contrastive import nt_xent
from nnssl_ext.nn.projector import normalized_mlp
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.config import AT_LEAST_ONE, SHARE, check_interval, check_several
from nnssl_ext.trainers.pair_pictures import pair_rows
from nnssl_ext.trainers.pictures import Rows

# nnU-Net's operations and strengths; a tenth is blurred by lower resolution, none has inverted gamma
INTENSITY = replace(NNUNET, low_resolution=replace(NNUNET.low_resolution, p=0.1), gamma_inverted=Chance())


class SimCLRTrainer(SSLTrainer):
    """Finds the other crop of the same place among the crops of all other subjects of the batch.

    Two overlapping crops are mirrored, turned by quarters and augmented, each by itself. NT-Xent compares the projections of
    their pooled features: of all stages of a U-Net, of all tokens of a transformer. Crops of the same subject are no negatives.

    Source: Chen et al. 2020, arXiv:2002.05709; Wald et al. 2025, arXiv:2412.17041 (in 3D).
    """

    citation = "Chen, T., Kornblith, S., Norouzi, M., & Hinton, G. (2020). A simple framework for contrastive learning of visual representations. ICML."

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        iou: tuple[float, ...] = field(default=(0.5, 1.0), metadata=SHARE)  # of the two crops, lowest and highest
        hidden: int = field(default=2048, metadata=AT_LEAST_ONE)  # width of all three layers of the projection
        temperature: float = 0.5  # appendix B.9 (CIFAR-10)

    def __init__(
        self, plan: Plan, configuration: str, config: Config, store: CaseStore, folder: Path | str, *, family: str | None = None, device: str = "cpu"
    ) -> None:
        super().__init__(plan, configuration, config, store, folder, family=family, device=device)
        check_several(self.batch_size * self.ranks, type(self).__name__)
        check_interval(config.iou, "iou")

    def views(self) -> ViewSpec:
        patch = self.config_plan.patch_size
        turning = choose_turning(patch, self.config_plan.spacing, self.config_plan.in_volume(self.network_plan.cell))
        return IoUPair(patch, self.config.iou, intensity=INTENSITY, apart=True, turning=turning)

    def build(self, backbone: Backbone) -> nn.Module:
        return Projection(backbone, self.config.hidden)

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        vectors = model(torch.cat((batch["first"].image, batch["second"].image)))
        self.health.add("projection", vectors)
        first, second = vectors.chunk(2)
        return {"total": nt_xent(first, second, self.config.temperature, subject_numbers(self.store, batch["first"].cases))}

    def picture(self, batch: Batch) -> Rows:
        return pair_rows(self.store, batch["first"], batch["second"])


class Projection(nn.Module):
    """Backbone, and a perceptron of three layers on the averages of all of its maps.

    Averages of maps after InstanceNorm hardly differ between crops: without batch normalisation the contrast stays at chance.
    """

    def __init__(self, backbone: Backbone, hidden: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = normalized_mlp((sum(backbone.widths), hidden, hidden, hidden), last=True)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, z, y, x) to vectors (B, hidden)."""
        return self.projector(torch.cat([level.flatten(2).mean(2) for level in self.backbone.pyramid(x)], 1))  # type: ignore[no-any-return]
