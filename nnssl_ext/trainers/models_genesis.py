"""Models Genesis on U-Nets and on Primus."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
from torch import nn

from nnssl_ext.data.corrupt import bezier, paint_in, paint_out, shuffle
from nnssl_ext.data.corrupted import CorruptedCrop
from nnssl_ext.data.loader import Batch
from nnssl_ext.data.spatial import Spatial
from nnssl_ext.data.views import Crop, ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.pixel_head import Reconstruction
from nnssl_ext.nn.precision import wide
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.config import AT_LEAST_ONE, SHARE
from nnssl_ext.trainers.pictures import volume_rows


class ModelsGenesisTrainer(SSLTrainer):
    """Spoils a crop in up to three ways and restores the whole of it: order within windows, intensities, and what is painted over.

    The loss counts all voxels. Where nothing was spoilt the crop is to be reproduced.

    Source: Zhou et al. 2021, arXiv:2004.07882.
    """

    trains_decoder = True
    citation = "Zhou, Z., Sodha, V., Pang, J., Gotway, M. B., & Liang, J. (2021). Models Genesis. Medical Image Analysis, 67, 101840."

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        mirror: float = field(default=0.4, metadata=SHARE)  # probability, of input and target alike; each axis then half of the time
        shuffle: float = field(default=0.5, metadata=SHARE)  # probability that windows are shuffled
        windows: int = field(default=1000, metadata=AT_LEAST_ONE)  # that are shuffled, 1 voxel to a tenth of the crop (at least 2) along each axis
        bezier: float = field(default=0.9, metadata=SHARE)  # probability of a curve of intensities
        paint: float = field(default=0.9, metadata=SHARE)  # probability of boxes of noise
        outer: float = field(default=0.8, metadata=SHARE)  # share of the painted crops of which only boxes stay

    def views(self) -> ViewSpec:
        crop = Crop(self.config_plan.patch_size, Spatial(p_mirror=self.config.mirror))
        return CorruptedCrop(crop, partial(spoil, chances=self.config))

    def build(self, backbone: Backbone) -> nn.Module:
        return Reconstruction(backbone, backbone.channels)

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        difference = wide(model(batch["image"].image)) - wide(batch["target"].image)
        return {"total": difference.square().mean()}

    def picture(self, batch: Batch) -> list[dict[str, np.ndarray]]:
        spoilt, crop = batch["image"].image[:2], batch["target"].image[:2]
        return volume_rows({"crop": crop, "spoilt": spoilt, "restored": self.model(spoilt)})


def spoil(image: np.ndarray, rng: np.random.Generator, chances: ModelsGenesisTrainer.Config) -> np.ndarray:
    """The corrupted version of a crop (C, z, y, x); the crop itself where chance leaves it alone."""
    if rng.random() < chances.shuffle:
        image = shuffle(image, rng, chances.windows, (1, np.maximum(2, np.array(image.shape[1:]) // 10)))
    if rng.random() < chances.bezier:
        image = bezier(image, rng)
    if rng.random() < chances.paint:
        image = (paint_out if rng.random() < chances.outer else paint_in)(image, rng)
    return image
