"""Contrast of places: what two views show of the same place is told from what they show elsewhere."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.precision import wide

CONTRALATERAL = ("exclude", "positive", "negative")  # what a place on the other side of the body is
WIDEST = 64  # channels of a map of all voxels; a wider decoder's are mixed into as many
EPS = 1e-6  # of the norms: a vector of zeros stays one
_EXACT = 1e-6  # mm; what rounding may add to a distance


class PlaceProjection(nn.Module):
    """Backbone, and a perceptron of two layers from its features at given places onto the unit sphere.

    The features are those of the decoder; without one, those of all maps of the pyramid, each read between its own cells.

    Args:
        backbone: U-Net (encoder and decoder) or encoder; a trainer sets `trains_decoder`.
        hidden: width of the perceptron's hidden layer.
        bottleneck: dimensions of the sphere.

    Source: Hariharan et al. 2015, arXiv:1411.5752 (features of several maps at a place).
    """

    def __init__(self, backbone: Backbone, hidden: int, bottleneck: int) -> None:
        super().__init__()
        self.backbone, self.decodes = backbone, "decoder" in backbone.supports
        self.cells = ((1, 1, 1),) if self.decodes else backbone.strides
        width = min(WIDEST, backbone.decoded) if self.decodes else sum(backbone.widths)
        self.narrow = nn.Conv3d(backbone.decoded, width, 1) if self.decodes and backbone.decoded > WIDEST else nn.Identity()
        self.projector = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, bottleneck))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """Unit vectors (B, Q, bottleneck) of images (B, C, z, y, x) at places (B, Q, 3) in voxels."""
        maps = self.backbone.pyramid(x)
        maps = [self.backbone.project(maps, self.narrow)] if self.decodes else maps
        features = [values_at(level, (places + 0.5) / places.new_tensor(cell) - 0.5) for level, cell in zip(maps, self.cells)]
        return F.normalize(wide(self.projector(torch.cat(features, 2))), dim=2, eps=EPS)


def values_at(maps: Tensor, places: Tensor) -> Tensor:
    """Volumes (B, C, d, h, w) at places (B, Q, 3) between their cells, trilinear, as (B, Q, C) in single precision; beyond the border that of the border.

    Only the cells around the places are read, in whatever precision they are: a map of all voxels is not copied.
    """
    shape = maps.shape[2:]
    last = places.new_tensor([n - 1 for n in shape])
    places = places.clamp_min(0).minimum(last)
    low = places.floor()
    weights, cells = [], []
    for corner in product((0, 1), repeat=3):
        upper = torch.tensor(corner, dtype=torch.bool, device=places.device)
        weights.append(torch.where(upper, places - low, 1 - (places - low)).prod(2))
        z, y, x = (low + upper).minimum(last).long().unbind(2)
        cells.append((z * shape[1] + y) * shape[2] + x)
    index = torch.stack(cells, 1)  # (B, 8, Q)
    found = maps.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, maps.shape[1], -1)).unflatten(2, index.shape[1:])
    return (wide(found) * torch.stack(weights, 1)[:, None]).sum(2).mT


def contralateral(positions: Tensor, radius: float) -> Tensor:
    """Which places lie at most `radius` mm from the mirror image of which, (B, Q, Q) bool, symmetric; a place near the plane is its own partner.

    Args:
        positions: mm from the sagittal plane and along it, x first, (B, Q, 3), see `data.sagittal`.
        radius: mm.
    """
    mirrored = positions * positions.new_tensor([-1, 1, 1])
    return torch.cdist(mirrored, positions, compute_mode="donot_use_mm_for_euclid_dist") <= radius + _EXACT


def place_contrast(
    first: Tensor, second: Tensor, valid: Tensor, partners: Tensor, temperature: float, handling: str = "exclude", weight: float = 0.5
) -> Tensor:
    """Mean over views, samples and their places i of -sum_j t_ij log p_ij, where p_ij is the share of place j of the other view of the same sample:

        p_ij = exp(z_i . z_j / T) / sum_k exp(z_i . z_k / T)

    The target t is 1 at j = i. A partner, which lies on the other side of the body, is left out of the sum over k ("exclude"); or all
    partners of i together are a target of `weight`, where it has any, with which t is brought to the sum 1 ("positive"); or it is
    one k like others ("negative").

    Args:
        first, second: unit vectors of the same places in two views, (B, Q, D).
        valid: which places count, (B, Q) bool; at least one of each sample.
        partners: which places are partners, (B, Q, Q) bool, symmetric; that a place is its own is ignored.
        temperature: T, above 0.
        handling: of partners, one of `CONTRALATERAL`.
        weight: of partners as targets, over that of the place itself.

    Source: Xie et al. 2021, arXiv:2011.10043 (of the pixels that two views share); Khosla et al. 2020, arXiv:2004.11362, eq. 2 (several positives).
    """
    own = torch.eye(partners.shape[1], dtype=torch.bool, device=partners.device)
    partners = partners & ~own & valid[:, None]
    compared = (valid[:, None] & ~partners if handling == "exclude" else valid[:, None]) | own
    with torch.autocast(first.device.type, enabled=False):
        first, second = wide(first), wide(second)
        target = own.to(first.dtype).expand(len(first), -1, -1)
        if handling == "positive":
            shares = partners.to(first.dtype)
            target = target + weight * shares / shares.sum(2, keepdim=True).clamp_min(1)
            target = target / target.sum(2, keepdim=True)
        scores = first @ second.mT / temperature
        one, other = (x.masked_fill(~compared, -torch.inf).log_softmax(2).masked_fill(~compared, 0) for x in (scores, scores.mT))
        costs = -(target * (one + other)).sum(2) / 2
        return (costs.masked_fill(~valid, 0).sum(1) / valid.sum(1)).mean()
