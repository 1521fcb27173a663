"""From the pyramids of two volumes to the stationary velocity that carries one onto the other, coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.matching import near_zero
from nnssl_ext.nn.precision import wide
from nnssl_ext.nn.warp import exponential, warp

RADIUS = 1  # cells, of the neighbourhood in which a cell is looked for at each scale
SHARPNESS = 20.0  # of the softmax over cosines by which a neighbourhood votes
LEAST_CELLS = 8  # along the longest axis of a map whose cells are looked for: wider cells than an eighth of the volume say little
_FLAT = 1e-3  # length of a feature below which it is no direction


def correlation(a: Tensor, b: Tensor, radius: int = RADIUS) -> Tensor:
    """Dot product of each cell of one map with the cells around the same place of another one; 0 outside.

    Args:
        a, b: (B, C, z, y, x).
        radius: cells, in each direction along each axis.

    Returns:
        (B, (2 radius + 1)^3, z, y, x), offsets in the order of `offsets`.
    """
    padded, size = F.pad(b, (radius,) * 6), a.shape[2:]
    windows = (padded[:, :, z : z + size[0], y : y + size[1], x : x + size[2]] for z, y, x in product(range(2 * radius + 1), repeat=3))
    return torch.stack([(a * window).sum(1) for window in windows], 1)


def offsets(radius: int = RADIUS) -> Tensor:
    """Of a neighbourhood's cells, ((2 radius + 1)^3, 3) over the axes (z, y, x)."""
    return torch.tensor(list(product(range(-radius, radius + 1), repeat=3)), dtype=torch.get_default_dtype())


def vote(similar: Tensor, radius: int = RADIUS) -> Tensor:
    """The mean offset (B, 3, z, y, x) of the cells inside of the map, weighted by the softmax of a `correlation` of directions."""
    one = similar.new_ones(1, 1, *similar.shape[2:])
    votes = torch.softmax((SHARPNESS * similar).masked_fill(correlation(one, one, radius) == 0, -torch.inf), 1)
    return (votes[:, :, None] * offsets(radius).to(similar)[:, :, None, None, None]).sum(1)


def rescale(field: Tensor, shape: Sequence[int]) -> Tensor:
    """A velocity or displacement (B, 3, ...) on another grid over the same volume (trilinear between centres of cells), in that grid's cells."""
    factor = field.new_tensor([new / old for new, old in zip(shape, field.shape[2:])]).view(3, 1, 1, 1)
    return resize(field, shape) * factor


def resize(maps: Tensor, shape: Sequence[int]) -> Tensor:
    """Maps (B, C, ...) on another grid over the same volume (trilinear between centres of cells)."""
    return F.interpolate(maps, size=tuple(shape), mode="trilinear", align_corners=False)


def directions(features: Tensor) -> Tensor:
    """Features (B, C, z, y, x) as unit vectors about their mean over the volume: what all cells have in common tells none from another."""
    features = wide(features)
    return F.normalize(features - features.mean((2, 3, 4), keepdim=True), dim=1, eps=_FLAT)


class VelocityStep(nn.Module):
    """What one scale adds to a velocity: the moving volume's features are warped by it and looked for around each cell of the fixed one.

    Args:
        channels: of the features.
        hidden: channels of the two convolutions.
    """

    def __init__(self, channels: int, hidden: int = 32) -> None:
        super().__init__()
        layers = [
            nn.Conv3d(len(offsets()) + 6 + channels, hidden, 3, padding=1),
            nn.LeakyReLU(0.01),
            nn.Conv3d(hidden, hidden, 3, padding=1),
            nn.LeakyReLU(0.01),
        ]
        self.decide = nn.Sequential(*layers, near_zero(nn.Conv3d(hidden, 3, 1)))

    def forward(self, fixed: Tensor, moving: Tensor, velocity: Tensor) -> Tensor:
        """The better velocity (B, 3, d, h, w), in cells, of features (B, channels, d, h, w) and the velocity so far."""
        a, b = directions(fixed), directions(moving)
        similar = correlation(a, warp(b, exponential(velocity)))
        return velocity + wide(self.decide(torch.cat((similar, vote(similar), velocity, a), 1)))


class RegistrationNet(nn.Module):
    """Backbone, a pyramid of equally wide features from coarse to fine, and a velocity step at each scale that is neither too coarse nor that of voxels.

    Args:
        backbone: any with a pyramid.
        channels: of the features.

    Source: Lin et al. 2017, arXiv:1612.03144 (the pyramid); Sun et al. 2018, arXiv:1709.02371 (steps).
    """

    def __init__(self, backbone: Backbone, channels: int = 32) -> None:
        super().__init__()
        self.backbone = backbone
        self.scales = [scale for scale, stride in enumerate(backbone.strides) if max(stride) > 1]
        self.lateral = nn.ModuleList(nn.Conv3d(backbone.widths[scale], channels, 1) for scale in self.scales)
        cells = [max(n // step for n, step in zip(backbone.patch_size, backbone.strides[scale])) for scale in self.scales]
        self.steps = nn.ModuleList(VelocityStep(channels) for i, n in enumerate(cells) if i == 0 or n >= LEAST_CELLS)  # finest first, as the scales

    def forward(self, fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        """Of volumes (B, C, z, y, x): the velocity at half resolution, in its cells, and the displacement that warps the moving one, (B, 3, z, y, x) voxels."""
        maps, shape = self.backbone.pyramid(torch.cat((fixed, moving))), fixed.shape[2:]
        features = [narrow(maps[scale]) for scale, narrow in zip(self.scales, self.lateral)]
        for finer in range(len(features) - 2, -1, -1):
            features[finer] = features[finer] + resize(features[finer + 1], features[finer].shape[2:])
        velocity = fixed.new_zeros(len(fixed), 3, 1, 1, 1)
        for feature, step in list(zip(features, self.steps))[::-1]:
            velocity = step(*feature.chunk(2), rescale(velocity, feature.shape[2:]))
        velocity = rescale(velocity, [-(-n // 2) for n in shape])
        return velocity, rescale(exponential(velocity), shape)
