"""Geometric visual similarity learning: register two subjects and restore one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
from torch import nn

from nnssl_ext.data.loader import Batch
from nnssl_ext.data.partners import MatchedPair, training_partners
from nnssl_ext.data.spatial import Spatial
from nnssl_ext.data.views import Crop, ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.matching import MatchingUNet
from nnssl_ext.nn.precision import wide
from nnssl_ext.nn.registration_losses import flow_gradient, squared_lncc
from nnssl_ext.nn.warp import warp
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.config import SHARE
from nnssl_ext.trainers.models_genesis import ModelsGenesisTrainer, spoil
from nnssl_ext.trainers.pictures import volume_rows


class GVSLTrainer(SSLTrainer):
    """Moves a crop of another subject onto a crop that it sees corrupted, first by an affine map, then by a dense flow, and restores the corrupted one.

    The loss is 1 - squared local correlation of the moved crop and the clean one, plus the mean squared error of the restored
    one, plus the mean squared gradient of the flow. Features have to say the same of the same anatomy in two subjects.

    Source: He et al. 2023, arXiv:2303.00874.
    """

    needs = (frozenset({"pyramid", "decoder", "volume"}),)
    trains_decoder = True
    citation = (
        "He, Y., Yang, G., Ge, R., Chen, Y., Coatrieux, J.-L., Wang, B., & Li, S. (2023). Geometric visual similarity learning in 3D medical image "
        "self-supervised pre-training. CVPR, 9538-9547."
    )

    @dataclass(frozen=True)
    class Config(ModelsGenesisTrainer.Config):
        shuffle: float = field(default=0.8, metadata=SHARE)  # the authors' code, as what follows
        outer: float = field(default=0.0, metadata=SHARE)  # enough is left for a registration
        similarity: float = 1.0  # weight of 1 - squared correlation
        restoration: float = 1.0  # weight of the squared error
        smoothness: float = 1.0  # weight of the flow's gradient

    def views(self) -> ViewSpec:
        partners = training_partners(self.store, self.config.seed, type(self).__name__, self.plan.dataset_name)
        return MatchedPair(Crop(self.config_plan.patch_size, Spatial(p_mirror=self.config.mirror)), partial(spoil, chances=self.config), partners)

    def build(self, backbone: Backbone) -> nn.Module:
        return MatchingUNet(backbone, self.config_plan.spacing_for((1.0, 1.0, 1.0)))

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        target, moving, config = batch["target"].image, batch["moving"].image, self.config
        restored, flow, displacement = model(batch["image"].image, moving)
        similarity = 1 - squared_lncc(warp(moving, displacement), target)
        restoration = (wide(restored) - wide(target)).square().mean()
        smoothness = flow_gradient(flow)
        total = config.similarity * similarity + config.restoration * restoration + config.smoothness * smoothness
        return {"total": total, "similarity": similarity, "restoration": restoration, "smoothness": smoothness}

    def picture(self, batch: Batch) -> list[dict[str, np.ndarray]]:
        fixed, seen, moving = (batch[name].image[:2] for name in ("target", "image", "moving"))
        restored, flow, displacement = self.model(seen, moving)
        length = wide(flow).square().sum(1, keepdim=True).sqrt()
        volumes = {"fixed": fixed, "seen": seen, "restored": restored, "moving": moving, "warped": warp(moving, displacement)}
        rows = volume_rows({**volumes, "flow": length / length.amax().clamp_min(1e-6)})
        for row in rows:
            row["flow"] = np.repeat(row["flow"][..., None], 3, axis=-1)
        return rows
