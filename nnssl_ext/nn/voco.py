"""The model of VoCo and its losses: positions of crops, told by their likeness to the crops of a grid.

Shape suffixes: B volumes, k targets and n base crops of each, D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_ext.nn import distributed
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.momentum import MomentumTeacher
from nnssl_ext.nn.precision import wide

EPS = 1e-6  # in the logarithms and of the norms


class Standardize(nn.Module):
    """Every channel of the crops of a volume, (B, crops, D), to mean 0 and variance 1 over them."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(wide(x).mT, x.shape[1:2]).mT


class CropProjector(nn.Module):
    """Backbone, maps of all its levels averaged over the crop, and three linear layers.

    Args:
        hidden: width of all layers.
    """

    def __init__(self, backbone: Backbone, hidden: int) -> None:
        super().__init__()
        self.backbone = backbone
        widths = [sum(backbone.widths), hidden, hidden, hidden]
        first, second, last = (nn.Linear(before, after) for before, after in zip(widths, widths[1:]))
        self.mlp = nn.Sequential(first, Standardize(), nn.ReLU(), second, Standardize(), nn.ReLU(), last)

    def forward(self, crops: Tensor) -> Tensor:
        """Crops (views, B, channels, z, y, x) to vectors (B, views, hidden)."""
        maps = self.backbone.pyramid(crops.flatten(0, 1))
        pooled = torch.cat([wide(level).flatten(2).mean(2) for level in maps], 1)
        vectors: Tensor = self.mlp(pooled.unflatten(0, crops.shape[:2]).transpose(0, 1))
        return vectors


class VoCoModel(nn.Module):
    """Student and momentum teacher, which starts as its copy."""

    def __init__(self, student: CropProjector) -> None:
        super().__init__()
        self.student, self.teacher = student, MomentumTeacher(student)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """What student and teacher make of crops (views, B, channels, z, y, x), both (B, views, D)."""
        return self.student(crops), self.teacher(crops)


def likeness(targets: Tensor, bases: Tensor) -> Tensor:
    """Positive part of the cosines of targets (B, k, D) and base crops (B, n, D): (B, k, n) in [0, 1].

    Source: Wu et al. 2024, arXiv:2402.17300, eq. 1.
    """
    with torch.autocast(targets.device.type, enabled=False):
        targets, bases = (F.normalize(wide(x), dim=-1, eps=EPS) for x in (targets, bases))
        return (targets @ bases.mT).clamp(0, 1)


def present(s: Tensor, o: Tensor) -> Tensor:
    """-sum_j o_j log(1 - |o_j - s_j|) / sum_j o_j of every row: (..., n) to (...); 0 where no base crop is covered."""
    o = o.to(s.dtype)
    return -(o * _log(1 - (o - s).abs())).sum(-1) / o.sum(-1).clamp_min(EPS)


def absent(s: Tensor, o: Tensor) -> Tensor:
    """-mean of log(1 - s_j) over what has o_j = 0, of every row: (..., n) to (...); 0 where every base crop is covered."""
    free = o == 0
    return -_log(1 - s).masked_fill(~free, 0).sum(-1) / free.sum(-1).clamp_min(1)


def _log(x: Tensor) -> Tensor:
    """Logarithm of x + EPS, 0 from 1 on: a difference by rounding alone has no gradient, whose sign would be that of the rounding."""
    return (x + EPS).clamp_max(1).log()


def position_loss(s: Tensor, o: Tensor) -> Tensor:
    """Mean over all targets of `present` plus `absent`.

    Args:
        s: predicted likeness, (B, k, n) in [0, 1].
        o: the true one, a share of overlap or what a teacher says; without gradient.

    Source: Wu et al. 2024, arXiv:2402.17300, eq. 3 and 4.
    """
    return (present(s, o) + absent(s, o)).mean()


def crowding(bases: Tensor) -> Tensor:
    """Mean over the pairs of base crops (B, n, D) of a volume of the squared `likeness`.

    Source: Wu et al. 2024, arXiv:2402.17300, eq. 5.
    """
    first, second = torch.triu_indices(bases.shape[1], bases.shape[1], 1, device=bases.device)
    return likeness(bases, bases)[:, first, second].square().mean()


def next_volume(bases: Tensor) -> Tensor:
    """The base crops (B, n, D) of the next volume of the batch, of all ranks' one; without gradient."""
    everybody = distributed.stacked(bases).flatten(0, 1)
    own = distributed.rank() * len(bases) + torch.arange(len(bases), device=bases.device)
    return everybody[(own + 1) % len(everybody)]
