"""Example of a plug-in: a whole pretraining method in one file."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnssl_ext.data.loader import Batch
from nnssl_ext.data.views import Crop, ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.trainers.base import Losses, SSLTrainer


class DenoisingTrainer(SSLTrainer):
    """Adds Gaussian noise to a crop and learns to remove it.

    Source: Vincent et al. 2008, doi:10.1145/1390156.1390294 (denoising autoencoders).
    """

    needs = (frozenset({"decoder"}),)
    trains_decoder = True
    citation = "Vincent, P., Larochelle, H., Bengio, Y., & Manzagol, P.-A. (2008). Extracting and composing robust features with denoising autoencoders. ICML."

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        noise: float = 0.5  # standard deviation, in units of the normalised intensities

    def views(self) -> ViewSpec:
        return Crop(self.config_plan.patch_size)

    def build(self, backbone: Backbone) -> nn.Module:
        return Denoiser(backbone)

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        clean = batch["image"].image
        restored = model(clean + self.config.noise * torch.randn_like(clean))
        return {"total": (restored.float() - clean.float()).square().mean()}


class Denoiser(nn.Module):
    """Encoder, decoder and a pointwise layer to the input channels."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv3d(backbone.widths[0], backbone.channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, z, y, x) -> the same shape."""
        return self.head(self.backbone.decode(self.backbone.pyramid(x)))
