"""From the features of a backbone to an image of the input's size."""

from __future__ import annotations

import math

from einops import rearrange
from torch import Tensor, nn

from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.tokens import unpatchify


class Reconstruction(nn.Module):
    """Backbone and one linear layer to the voxels: pointwise after a decoder; without one, from each cell of the deepest map to all of its voxels.

    Every family that supports "pyramid" can be used. A trainer sets `trains_decoder`.

    Args:
        backbone: U-Net (encoder, decoder) or transformer (encoder).
        out_channels: of the image.
    """

    def __init__(self, backbone: Backbone, out_channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.cell = backbone.strides[-1]
        self.decodes = "decoder" in backbone.supports
        if self.decodes:
            self.head: nn.Module = nn.Conv3d(backbone.decoded, out_channels, 1)
        else:
            self.head = nn.Linear(backbone.widths[-1], out_channels * math.prod(self.cell))

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, out_channels, z, y, x) of an input (B, channels, z, y, x)."""
        return self.from_maps(self.backbone.pyramid(x))

    def from_maps(self, maps: list[Tensor]) -> Tensor:
        """The same of the backbone's pyramid, for methods that use its maps otherwise, too."""
        if self.decodes:
            return self.backbone.project(maps, self.head)
        deepest = maps[-1]
        return unpatchify(self.head(rearrange(deepest, "b c z y x -> b (z y x) c")), deepest.shape[2:], self.cell)
