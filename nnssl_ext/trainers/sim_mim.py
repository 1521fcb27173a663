"""SimMIM: masked image modelling with mask tokens, on Primus and on U-Nets."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from nnssl_ext.data.loader import Batch
from nnssl_ext.data.masking import MaskedCrop, mask_block
from nnssl_ext.data.views import Crop, ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.backbones.primus import PrimusBackbone
from nnssl_ext.nn.losses import masked_l1, masked_mse
from nnssl_ext.nn.pixel_head import Reconstruction
from nnssl_ext.nn.tokens import voxel_mask
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.config import AT_LEAST_ONE, SHARE
from nnssl_ext.trainers.optim import RECIPES, Recipe
from nnssl_ext.trainers.pictures import masked_rows

# weight decay, betas and clip of the source; its learning rate is one for 2048 images, hence that of Primus, with its warm-up
_RECIPE = Recipe("adamw", 3e-4, 5e-2, 0.05, 5.0, (0.9, 0.999))


class SimMIMTrainer(SSLTrainer):
    """Puts a learned token in the place of large random blocks, encodes everything, and predicts the hidden voxels with one linear layer.

    Primus: a learned vector replaces the embedding of each hidden token. U-Net: a learned value per channel replaces each
    hidden voxel, because no later place in it is free of hidden voxels; its decoder reconstructs. Hidden voxels have no
    influence.

    Source: Xie et al. 2022, arXiv:2111.09886.
    """

    default_family = "primus"
    needs = (frozenset({"mask_token"}), frozenset({"decoder"}))
    trains_decoder = True
    recipes = dict.fromkeys(RECIPES.keys() - {"resenc"}, _RECIPE)
    citation = "Xie, Z., Zhang, Z., Cao, Y., Lin, Y., Bao, J., Yao, Z., Dai, Q., & Hu, H. (2022). SimMIM: a simple framework for masked image modeling. CVPR."

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        mask_ratio: float = field(default=0.6, metadata=SHARE)  # share of blocks that are hidden (section 4.1)
        mask_block: int = field(default=32, metadata=AT_LEAST_ONE)  # voxels along a block's edge (section 4.1); at least four blocks along an axis
        squared: bool = False  # squared instead of absolute errors (section 4.1: no difference)

    def views(self) -> ViewSpec:
        patch, token = self.config_plan.patch_size, tuple(self.network_plan.kwargs.get("patch_embed_size", (1, 1, 1)))
        block = tuple(max(1, edge // cell) * cell for edge, cell in zip(mask_block(patch, self.config.mask_block), token))
        return MaskedCrop(Crop(patch), block, self.config.mask_ratio, cell=token if max(token) > 1 else None)

    def build(self, backbone: Backbone) -> nn.Module:
        return MaskedImageModel(backbone)

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        view = batch["image"]
        assert view.mask is not None
        loss = masked_mse if self.config.squared else masked_l1
        return {"total": loss(model(view.image, view.mask), view.image, voxel_mask(view.mask, view.image.shape[2:]))}

    def picture(self, batch: Batch) -> list[dict[str, np.ndarray]]:
        view = batch["image"]
        assert view.mask is not None
        image, mask = view.image[:2], view.mask[:2]
        return masked_rows(image, mask, self.model(image, mask))


class MaskedImageModel(Reconstruction):
    """Backbone and linear layer, with a learned stand-in for what is hidden."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, backbone.channels)
        self.mask_token = nn.Parameter(torch.empty(backbone.width if isinstance(backbone, PrimusBackbone) else backbone.channels).normal_(std=0.02))

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """Prediction (B, C, z, y, x) of all voxels from the visible ones.

        Args:
            image: (B, C, z, y, x).
            mask: bool, True = hidden: (B, d, h, w) of blocks; of tokens where the backbone has them.
        """
        if not isinstance(self.backbone, PrimusBackbone):
            return super().forward(torch.where(voxel_mask(mask, image.shape[2:]), self.mask_token[:, None, None, None], image))
        z, y, x = mask.shape[1:]
        tokens = self.backbone.tokens(image, mask=mask.flatten(1), mask_token=self.mask_token)
        return self.from_maps([rearrange(tokens, "b (z y x) c -> b c z y x", z=z, y=y, x=x)])
