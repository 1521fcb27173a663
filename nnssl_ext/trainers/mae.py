"""Masked autoencoder on U-Nets and on Primus."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_ext.data.loader import Batch
from nnssl_ext.data.masking import MaskedCrop, mask_block
from nnssl_ext.data.views import Crop, ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.backbones.primus import PrimusBackbone
from nnssl_ext.nn.losses import masked_mse
from nnssl_ext.nn.pixel_head import Reconstruction
from nnssl_ext.nn.tokens import block_moments, gather, patchify, split_tokens, unpatchify, voxel_mask
from nnssl_ext.nn.transformer import HEAD_WIDTH, transformer
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.config import AT_LEAST_ONE, SHARE
from nnssl_ext.trainers.pictures import masked_rows


class MAETrainer(SSLTrainer):
    """Hides blocks of a crop and reconstructs their voxels; the loss counts hidden voxels only.

    U-Net: hidden voxels are zeroed, encoder and decoder reconstruct the crop. Primus: only visible tokens are encoded;
    a light transformer fills in the hidden ones. Hidden voxels never reach the encoder.

    Source: He et al. 2022, arXiv:2111.06377; Wald et al. 2024, arXiv:2410.23132 (3D, U-Nets).
    """

    needs = (frozenset({"decoder"}), frozenset({"token_drop"}))
    trains_decoder = True
    citation = "He, K., Chen, X., Xie, S., Li, Y., Dollár, P., & Girshick, R. (2022). Masked autoencoders are scalable vision learners. CVPR."

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        mask_ratio: float = field(default=0.75, metadata=SHARE)  # share of blocks or tokens that are hidden
        mask_block: int = field(default=16, metadata=AT_LEAST_ONE)  # U-Net only: voxels along a block's edge
        normalise: bool = False  # the target: every block or token minus its mean, over its standard deviation (per channel)
        decoder_depth: int = field(default=2, metadata=AT_LEAST_ONE)  # Primus only: transformer blocks of the decoder
        decoder_width: int = field(default=192, metadata=AT_LEAST_ONE)  # Primus only: channels of the decoder, at most the encoder's

    def views(self) -> ViewSpec:
        token = self.network_plan.kwargs.get("patch_embed_size")
        block = tuple(token) if token else mask_block(self.config_plan.patch_size, self.config.mask_block)
        return MaskedCrop(Crop(self.config_plan.patch_size, body=0.0), block, self.config.mask_ratio)

    def build(self, backbone: Backbone) -> nn.Module:
        if isinstance(backbone, PrimusBackbone):
            return MaskedTransformer(backbone, self.config.decoder_depth, self.config.decoder_width)
        return MaskedUNet(backbone)

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        view = batch["image"]
        assert view.mask is not None
        target = view.image
        if self.config.normalise:
            mean, deviation = block_moments(target, view.mask.shape[1:])
            target = (target - mean) / deviation
        return {"total": masked_mse(*model(view.image, view.mask, target))}

    def picture(self, batch: Batch) -> list[dict[str, np.ndarray]]:
        view = batch["image"]
        assert view.mask is not None
        image, mask = view.image[:2], view.mask[:2]
        reconstruction, caption = self.model.reconstruct(image, mask).float(), "reconstruction"
        if self.config.normalise:
            mean, deviation = block_moments(image, mask.shape[1:])  # nothing predicts them
            reconstruction, caption = mean + deviation * reconstruction, "reconstruction (mean, spread given)"
        return masked_rows(image, mask, reconstruction, caption)


class MaskedUNet(Reconstruction):
    """Encoder, decoder and a pointwise reconstruction layer, which see the visible voxels only."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, backbone.channels)

    def reconstruct(self, image: Tensor, mask: Tensor) -> Tensor:
        """Reconstruction (B, C, z, y, x) of the crop from its visible voxels."""
        return super().forward(image.masked_fill(voxel_mask(mask, image.shape[2:]), 0.0))

    def forward(self, image: Tensor, mask: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Prediction and target (B, C, z, y, x), and which voxels are hidden."""
        return self.reconstruct(image, mask), target, voxel_mask(mask, image.shape[2:])


class MaskedTransformer(nn.Module):
    """Encoder over visible tokens, light decoder over all of them, a linear layer to the voxels of a token."""

    def __init__(self, backbone: PrimusBackbone, depth: int, width: int) -> None:
        super().__init__()
        width = max(HEAD_WIDTH, min(width, backbone.width) // HEAD_WIDTH * HEAD_WIDTH)
        self.backbone = backbone
        self.embed = nn.Linear(backbone.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.normal_(self.mask_token, std=0.02)
        self.decoder = transformer(width, depth, backbone.grid)
        self.head = nn.Linear(width, backbone.channels * int(np.prod(backbone.token)))

    def decode(self, image: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Decoder features of all tokens, (B, N, width)."""
        encoded = self.embed(self.backbone.tokens(image, keep=visible))
        tokens = torch.cat((encoded, self.mask_token.to(encoded.dtype).expand(len(image), hidden.shape[1], -1)), 1)
        place = torch.cat((visible, hidden), 1).argsort(1)  # back to the order of the grid
        features: Tensor = self.decoder(gather(tokens, place))[0]
        return features

    def forward(self, image: Tensor, mask: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prediction and target of the hidden tokens, (B, K, voxels of a token * C), all of them counted."""
        visible, hidden = split_tokens(mask.flatten(1))
        prediction = self.head(gather(self.decode(image, visible, hidden), hidden))
        return prediction, gather(patchify(target, self.backbone.token), hidden), torch.ones_like(prediction, dtype=torch.bool)

    def reconstruct(self, image: Tensor, mask: Tensor) -> Tensor:
        """Prediction (B, C, z, y, x) of every token."""
        values = self.head(self.decode(image, *split_tokens(mask.flatten(1))))
        return unpatchify(values, self.backbone.grid, self.backbone.token)
