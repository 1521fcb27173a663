"""Bilateral dense contrast: voxels that two crops share are told from each other, but not from those on the other side of the body."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.plan import Plan
from nnssl_ext.data.augment import NNUNET
from nnssl_ext.data.loader import Batch
from nnssl_ext.data.overlapping import OverlappingCrops
from nnssl_ext.data.sagittal import BodyFrames
from nnssl_ext.data.spatial import MILD
from nnssl_ext.data.views import ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.correspondence import moved, shared_places
from nnssl_ext.nn.dense_contrast import CONTRALATERAL, PlaceProjection, contralateral, place_contrast
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.config import AT_LEAST_ONE, SHARE, check_interval
from nnssl_ext.trainers.match_pictures import match_rows
from nnssl_ext.trainers.pictures import Rows

ZOOM = (0.85, 1.2)  # of each crop; 1.2 / 0.85 leaves an IoU of 0.3 possible


class BilateralDenseContrastTrainer(SSLTrainer):
    """Finds each voxel of a crop among the voxels that another crop of the same case shares with it, and the other way round.

    loss = -mean over shared voxels i and both directions of log(exp(z_i . z'_i / T) / sum_k exp(z_i . z'_k / T)), z and z' unit
    vectors of the two crops at the same places. The body is nearly symmetric: what lies about the mirror image of i, at the
    sagittal plane of the case, is left out of the sum over k (or is another positive, or a negative like others).

    Source: Xie et al. 2021, arXiv:2011.10043 (contrast of the pixels that two views share); Pinheiro et al. 2020, arXiv:2011.05499
    (by encoder and decoder); Zeng et al. 2021, arXiv:2106.09157 (false negatives are told by position). The sagittal plane is ours.
    """

    trains_decoder = True
    citation = (
        "Xie, Z., Lin, Y., Zhang, Z., Cao, Y., Lin, S., & Hu, H. (2021). Propagate yourself: Exploring pixel-level consistency for unsupervised visual "
        "representation learning. CVPR, 16684-16693."
    )

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        iou: tuple[float, ...] = field(default=(0.3, 1.0), metadata=SHARE)  # of the two crops, lowest and highest
        voxels: int = field(default=1024, metadata=AT_LEAST_ONE)  # that are compared, of a pair of crops, at most
        hidden: int = field(default=256, metadata=AT_LEAST_ONE)  # width of the projector's hidden layer
        bottleneck: int = field(default=128, metadata=AT_LEAST_ONE)  # dimensions of the sphere; Wang et al. 2021, arXiv:2011.09157
        temperature: float = 0.1
        contralateral: str = "exclude"  # voxels on the other side: "exclude", "positive", "negative"
        weight: float = 0.5  # of the contralateral voxels as positives, over that of the voxel itself
        radius: float = 15.0  # mm about a voxel's mirror image in which others count as contralateral

    def __init__(
        self, plan: Plan, configuration: str, config: Config, store: CaseStore, folder: Path | str, *, family: str | None = None, device: str = "cpu"
    ) -> None:
        super().__init__(plan, configuration, config, store, folder, family=family, device=device)
        check_interval(config.iou, "iou")
        if config.contralateral not in CONTRALATERAL:
            what = f"contralateral voxels can't be '{config.contralateral}'"
            raise UserError(what, "option -o contralateral", f"give one of: {', '.join(CONTRALATERAL)}")
        self.frames = BodyFrames(store)

    def views(self) -> ViewSpec:
        patch = self.config_plan.patch_size
        return OverlappingCrops(patch, patch, iou=self.config.iou, global_zoom=ZOOM, spatial=MILD, intensity=NNUNET)  # type: ignore[arg-type]

    def build(self, backbone: Backbone) -> nn.Module:
        return PlaceProjection(backbone, self.config.hidden, self.config.bottleneck)

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        config, images = self.config, torch.cat((batch["global_0"].image, batch["global_1"].image))
        places, valid, positions = self.places(batch)
        vectors = model(images, places.flatten(0, 1).to(images))
        self.health.add("projection", vectors.flatten(0, 1))
        partners = contralateral(positions.to(images.device), config.radius)
        one, other = vectors.chunk(2)
        return {"total": place_contrast(one, other, valid.to(images.device), partners, config.temperature, config.contralateral, config.weight)}

    def places(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Where the crops are compared, in voxels of either, (2, B, Q, 3); which count, (B, Q); in mm of the body's frame, (B, Q, 3)."""
        first, second = batch["global_0"], batch["global_1"]
        places, valid = shared_places(first.affine, second.affine, first.image.shape[2:], self.model.cells[0], self.config.voxels)
        return places, valid, moved(moved(places[0], first.affine), self.frames(first.cases))

    def picture(self, batch: Batch) -> Rows:
        return match_rows(self.store, self.model, self.frames(batch["global_0"].cases).numpy(), batch["global_0"], batch["global_1"])
