"""PixelCluster: segmentation of clusters that the features of an earlier backbone fall into, the same from two overlapping crops."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.plan import Plan
from nnssl_ext.data.augment import NNUNET
from nnssl_ext.data.iou_pairs import IoUPair
from nnssl_ext.data.labelled import Labelled
from nnssl_ext.data.loader import Batch
from nnssl_ext.data.views import ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.correspondence import labels_of_other
from nnssl_ext.nn.pixel_head import Reconstruction
from nnssl_ext.nn.segmentation_losses import cross_entropy
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.colours import cluster_rgb, label_rgb
from nnssl_ext.trainers.config import SHARE, check_interval
from nnssl_ext.trainers.pictures import blend, volume_rows

PAIR = (("first", "second"), ("second", "first"))


class PixelClusterTrainer(SSLTrainer):
    """Predicts, for every voxel that two crops share, the cluster that the other crop has there; `nnssl_cluster` fits and assigns the clusters before.

    loss = -mean over shared voxels of log p_k, p = softmax over the K clusters of one crop's voxel, k the cluster of the same voxel
    in the other crop; for both crops alike. Clusters never change during the training, so that none can swallow the others.

    Source: Gogou 2024, Self-supervised learning for radiology (thesis, University of Amsterdam); Caron et al. 2018, arXiv:1807.05520 (clusters as classes).
    """

    needs = (frozenset({"pyramid", "decoder"}),)
    trains_decoder = True
    citation = "Caron, M., Bojanowski, P., Joulin, A., & Douze, M. (2018). Deep clustering for unsupervised learning of visual features. ECCV, 132-149."

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        iou: tuple[float, ...] = field(default=(0.3, 1.0), metadata=SHARE)  # of the two crops, lowest and highest

    def __init__(
        self, plan: Plan, configuration: str, config: Config, store: CaseStore, folder: Path | str, *, family: str | None = None, device: str = "cpu"
    ) -> None:
        super().__init__(plan, configuration, config, store, folder, family=family, device=device)
        check_interval(config.iou, "iou")
        self.labels = store.clusters()

    def views(self) -> ViewSpec:
        return Labelled(IoUPair(self.config_plan.patch_size, self.config.iou, intensity=NNUNET), self.labels)

    def build(self, backbone: Backbone) -> nn.Module:
        return Reconstruction(backbone, self.labels.classes)

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        logits = model(torch.cat([batch[name].image for name, _ in PAIR]))
        return {"total": cross_entropy(logits, torch.cat(self.swapped(batch)) - 1)}

    def swapped(self, batch: Batch) -> list[Tensor]:
        """For either crop the clusters that the other one has for its voxels, (B, z, y, x): 1 to K; 0 where there is none."""
        return [labels_of_other(batch[f"{other}_labels"].image[:, 0], batch[name].affine, batch[other].affine) for name, other in PAIR]

    def state(self) -> dict[str, Any]:
        return {**super().state(), "clusters": self.labels.model}

    def load(self, content: dict[str, Any], path: Path) -> None:
        if content["clusters"] != self.labels.model:
            raise UserError("the cases were assigned to other clusters than those of this run", path, "fit and assign the former ones, or begin a new run")
        super().load(content, path)

    def picture(self, batch: Batch) -> list[dict[str, np.ndarray]]:
        rows: list[dict[str, np.ndarray]] = [{} for _ in batch["first"].image[:2]]
        for (name, _), target in zip(PAIR, self.swapped(batch)):
            image = batch[name].image[:2]
            crops, predicted = volume_rows({name: image}), cluster_rgb(self.model(image))
            for row, crop, known, colours in zip(rows, crops, label_rgb(target[:2].cpu().numpy()), predicted):
                row |= crop | {f"{name} (assigned, shared)": blend(crop[name], known), f"{name} (predicted)": blend(crop[name], colours)}
        return rows
