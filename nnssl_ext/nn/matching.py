"""A U-Net that restores one volume and says how another one has to be moved onto it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.pixel_head import Reconstruction
from nnssl_ext.nn.precision import wide
from nnssl_ext.nn.warp import affine_displacement, affine_matrix, compose, warp


class AffineHead(nn.Module):
    """From the deepest maps of two volumes, (B, width, d, h, w) each, to the parameters (B, 12) of `affine_matrix`; near zero before it is trained.

    Args:
        width: channels of a map.
        hidden: channels that are averaged over the volume, a multiple of 8.
    """

    def __init__(self, width: int, hidden: int = 256) -> None:
        super().__init__()
        self.compare, self.linear = _block(2 * width, hidden), near_zero(nn.Linear(hidden, 12))

    def forward(self, fixed: Tensor, moving: Tensor) -> Tensor:
        return wide(self.linear(self.compare(torch.cat((fixed, moving), 1)).flatten(2).mean(2)))


class FlowHead(nn.Module):
    """From full-resolution features of two volumes, (B, width, z, y, x) each, to a displacement (B, 3, z, y, x) in voxels; near zero before it is trained.

    Args:
        width: channels of the features.
        hidden: channels in between, a multiple of 8.
    """

    def __init__(self, width: int, hidden: int = 16) -> None:
        super().__init__()
        self.compare = nn.Sequential(_block(2 * width, hidden), _block(hidden, hidden))
        self.flow = near_zero(nn.Conv3d(hidden, 3, 3, padding=1))

    def forward(self, fixed: Tensor, moving: Tensor) -> Tensor:
        return wide(self.flow(self.compare(torch.cat((fixed, moving), 1))))


class MatchingUNet(Reconstruction):
    """Backbone with decoder, a pointwise layer that restores the fixed volume, and both heads.

    Args:
        backbone: U-Net.
        spacing: mm, (z, y, x).
    """

    def __init__(self, backbone: Backbone, spacing: Sequence[float]) -> None:
        super().__init__(backbone, backbone.channels)
        self.spacing = tuple(spacing)
        self.affine, self.flow = AffineHead(backbone.widths[-1]), FlowHead(backbone.decoded)

    def forward(self, fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Of volumes (B, C, z, y, x): the fixed one restored, the flow, and the whole displacement that warps the moving one, (B, 3, z, y, x) both.

        The flow is found after the affine map, whose features of the moving volume it compares.
        """
        maps, shape = self.backbone.pyramid(torch.cat((fixed, moving))), fixed.shape[2:]
        matrix = affine_matrix(self.affine(*maps[-1].chunk(2)), shape, self.spacing)
        affine = affine_displacement(matrix, shape)
        features, others = self.backbone.decode(maps).chunk(2)
        flow = self.flow(features, warp(others, affine))
        return self.head(features), flow, compose(flow, affine)


def _block(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Conv3d(before, after, 3, padding=1), nn.GroupNorm(after // 8, after), nn.LeakyReLU(0.01))


def near_zero(layer: nn.Linear | nn.Conv3d) -> nn.Module:
    """A layer whose output is near zero, so that what is moved by it stays almost in place: between voxels an interpolation has a slope, on them it has two.

    Source: Balakrishnan et al. 2019, arXiv:1809.05231 (their code).
    """
    nn.init.normal_(layer.weight, std=1e-5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
