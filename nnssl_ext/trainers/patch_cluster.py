"""PatchCluster: patches are clustered while they are learned, and two crops have to agree on the cluster of every shared place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_ext.core.plan import Plan
from nnssl_ext.data.augment import NNUNET
from nnssl_ext.data.iou_pairs import IoUPair
from nnssl_ext.data.loader import Batch
from nnssl_ext.data.views import ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.correspondence import shared_grid, shared_voxels
from nnssl_ext.nn.heads import ProjectionHead
from nnssl_ext.nn.swapped import swapped_prediction
from nnssl_ext.nn.warp import warp
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.cluster_pictures import cluster_rows
from nnssl_ext.trainers.config import AT_LEAST_ONE, SHARE, check_interval
from nnssl_ext.trainers.pictures import Rows, feature_level


class PatchClusterTrainer(SSLTrainer):
    """Assigns the patches of two overlapping crops to learned prototypes, and predicts the assignments of each crop from the other one.

    Both are read at the same places. loss = -mean over places and crops of sum_k q_k log p_k; p = softmax(cosines with the
    prototypes / temperature) of one crop, q the balanced assignment (Sinkhorn) of the other one, without gradient.

    Source: Caron et al. 2020, arXiv:2006.09882 (swapped prediction); Ziegler & Asano 2022, arXiv:2204.13101 (of patches in the overlap).
    """

    citation = "Ziegler, A., & Asano, Y. M. (2022). Self-supervised learning of object parts for semantic segmentation. CVPR, 14502-14511."

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        iou: tuple[float, ...] = field(default=(0.3, 1.0), metadata=SHARE)  # of the two crops, lowest and highest
        prototypes: int = field(default=32, metadata=AT_LEAST_ONE)
        bottleneck: int = field(default=64, metadata=AT_LEAST_ONE)  # dimensions of the sphere on which they lie
        temperature: float = 0.1  # of the predictions; Caron et al.
        sharpness: float = 0.05  # temperature of the assignments; Caron et al.

    def __init__(
        self, plan: Plan, configuration: str, config: Config, store: CaseStore, folder: Path | str, *, family: str | None = None, device: str = "cpu"
    ) -> None:
        super().__init__(plan, configuration, config, store, folder, family=family, device=device)
        check_interval(config.iou, "iou")

    def views(self) -> ViewSpec:
        return IoUPair(self.config_plan.patch_size, self.config.iou, intensity=NNUNET)

    def build(self, backbone: Backbone) -> nn.Module:
        return PatchClusters(backbone, feature_level(backbone), self.config.bottleneck, self.config.prototypes)

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        first, second = batch["first"], batch["second"]
        grid = [size // edge for size, edge in zip(first.image.shape[2:], self.model.cell)]
        places = shared_grid(first.affine, second.affine, grid, self.model.cell).to(first.image)
        z, directions = model(torch.cat((first.image, second.image)), places.flatten(0, 1))
        vectors = z.flatten(0, -2)
        self.health.add_logits("clusters", vectors @ directions.T / self.config.temperature)
        one, other = vectors.chunk(2)
        return {"total": swapped_prediction(one, other, directions, self.config.temperature, self.config.sharpness)}

    def picture(self, batch: Batch) -> Rows:
        shown = {}
        for name, other in (("first", "second"), ("second", "first")):
            image, affines = batch[name].image[:2], (batch[name].affine[:2], batch[other].affine[:2])
            z, directions = self.model(image)
            shown[name] = (image, (z @ directions.T).movedim(-1, 1), shared_voxels(*affines, image.shape[2:]))
        return cluster_rows(shown)


class PatchClusters(nn.Module):
    """Backbone, one linear layer onto the sphere, prototypes on it.

    A cell's features are those of all maps from one level of the pyramid on, the coarser ones interpolated: the whole encoder is
    trained, and cells are as small as the tokens of a transformer.

    Args:
        level: of the pyramid, whose cells are clustered.
        bottleneck: dimensions of the sphere.
        prototypes: their number.
    """

    def __init__(self, backbone: Backbone, level: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.backbone, self.level, self.cell = backbone, level, backbone.strides[level]
        self.head = ProjectionHead(sum(backbone.widths[level:]), bottleneck=bottleneck, prototypes=prototypes, layers=1)

    def forward(self, x: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, d, h, w, bottleneck) of images (B, C, z, y, x), and prototypes (K, bottleneck).

        Args:
            places: displacements (B, 3, d, h, w) in cells by which the map is read; None = at its cells.
        """
        finest, *coarser = self.backbone.pyramid(x)[self.level :]
        maps = torch.cat([finest, *(F.interpolate(level, finest.shape[2:], mode="trilinear") for level in coarser)], 1)
        read = maps if places is None else warp(maps, places)
        return self.head(read.movedim(1, -1)), self.head.directions()
