"""SparK: masked autoencoder of a U-Net whose encoder computes the visible part only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_ext.data.loader import Batch
from nnssl_ext.data.masking import MaskedCrop, block_grid, hidden_count, stride_block
from nnssl_ext.data.views import Crop, ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.backbones.resenc import ResEncBackbone, total_strides
from nnssl_ext.nn.losses import masked_mse
from nnssl_ext.nn.pixel_head import Reconstruction
from nnssl_ext.nn.sparse import FEWEST, Densify, active_levels, too_few
from nnssl_ext.nn.tokens import voxel_mask
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.config import SHARE
from nnssl_ext.trainers.pictures import masked_rows


class SparkMAETrainer(SSLTrainer):
    """Reconstructs the hidden blocks of a crop; convolutions and norms of the encoder see its visible voxels only.

    To a dense U-Net a hidden block is a black one: its border is an edge, its voxels enter the moments of every norm, and what
    is visible spreads into it from level to level. Here cells without a visible voxel stay empty at every level, and are filled
    with learned tokens before the decoder. The encoder is the ordinary one and keeps its parameter names.

    Source: Tian et al. 2023, arXiv:2301.03580; Wald et al. 2024, arXiv:2410.23132 (3D, residual-encoder U-Nets).
    """

    needs = (frozenset({"sparse", "decoder"}),)
    trains_decoder = True
    transfers_decoder = False  # it has learned to read levels made dense by layers that are not transferred
    citation = "Tian, K., Jiang, Y., Diao, Q., Lin, C., Wang, L., & Yuan, Z. (2023). Designing BERT for convolutional networks. ICLR."

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        mask_ratio: float = field(default=0.6, metadata=SHARE)  # share of blocks that are hidden; Tian et al.

    def views(self) -> ViewSpec:
        patch, strides = self.config_plan.patch_size, total_strides(self.network_plan.kwargs)
        block = stride_block(patch, strides)
        blocks, in_a_cell = math.prod(block_grid(patch, block)), math.prod(strides[-1]) // math.prod(block)
        fewest = math.ceil((blocks - hidden_count(blocks, self.config.mask_ratio)) / in_a_cell)  # visible blocks side by side
        if fewest < FEWEST:
            raise too_few(fewest, strides[-1])
        return MaskedCrop(Crop(patch, body=0.0), block, self.config.mask_ratio)

    def build(self, backbone: Backbone) -> nn.Module:
        return SparseUNet(backbone)

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        view = batch["image"]
        prediction, hidden, active = model(view.image, view.mask)
        for level, share in enumerate(active):
            self.health.note(f"active/level_{level}", share)
        return {"total": masked_mse(prediction, view.image, hidden)}

    def picture(self, batch: Batch) -> list[dict[str, np.ndarray]]:
        image, mask = batch["image"].image[:2], batch["image"].mask
        assert mask is not None
        return masked_rows(image, mask[:2], self.model.reconstruct(image, mask[:2]))


class SparseUNet(Reconstruction):
    """Sparse encoder, levels made dense, decoder and a pointwise reconstruction layer."""

    backbone: ResEncBackbone

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, backbone.channels)
        *skips, deepest = backbone.widths
        self.densify = nn.ModuleList([*(Densify(width, mixed=True) for width in skips), Densify(deepest, mixed=False)])

    def reconstruct(self, image: Tensor, mask: Tensor) -> Tensor:
        """Reconstruction (B, C, z, y, x) of the crop from its visible voxels."""
        return self(image, mask)[0]  # type: ignore[no-any-return]

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Reconstruction (B, C, z, y, x), which voxels are hidden (B, 1, z, y, x), and the share of active cells at each level."""
        hidden = voxel_mask(mask, image.shape[2:])
        _, *levels = active = active_levels(hidden, self.backbone.strides)
        maps = self.backbone.pyramid(image, active=active)
        dense = [densify(features, level) for densify, features, level in zip(self.densify, maps, levels)]
        return self.from_maps(dense), hidden, torch.stack([level.float().mean() for level in levels])
