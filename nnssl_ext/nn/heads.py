"""Projection heads: from features to cosines with learned prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_ext.nn.precision import wide

EPS = 1e-6  # of the norms: a vector of zeros stays one


class ProjectionHead(nn.Module):
    """A perceptron onto the unit sphere, and prototypes on that sphere.

    The prototypes have directions only: the gain that weight normalisation would learn is 1. A student's cosines with them are
    left to the loss, since a matrix (n, prototypes) that has a gradient is best never made as a whole (`losses.cross_entropy_to`).

    Args:
        width: of the features.
        hidden: width of the hidden layers.
        bottleneck: dimensions of the sphere.
        prototypes: their number.
        layers: linear layers, 1 or more, with GELU between them.

    Source: Caron et al. 2021, arXiv:2104.14294, appendix C.
    """

    def __init__(self, width: int, hidden: int = 2048, bottleneck: int = 256, prototypes: int = 65536, layers: int = 3) -> None:
        super().__init__()
        widths = [width, *[hidden] * (layers - 1), bottleneck]
        linear = [nn.Linear(before, after) for before, after in zip(widths, widths[1:])]
        self.mlp = nn.Sequential(linear[0], *[module for layer in linear[1:] for module in (nn.GELU(), layer)])
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        for layer in linear:
            nn.init.zeros_(layer.bias)
        for weight in (*[layer.weight for layer in linear], self.prototypes):
            nn.init.trunc_normal_(weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Features (..., width), also none at all, to unit vectors (..., bottleneck) in single precision."""
        return _unit(self.mlp(x))

    def logits(self, x: Tensor) -> Tensor:
        """Cosines of features (n, width) with all prototypes, (n, prototypes)."""
        return self(x) @ self.directions().T  # type: ignore[no-any-return]

    def directions(self) -> Tensor:
        """The prototypes as unit vectors (prototypes, bottleneck)."""
        return _unit(self.prototypes)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(wide(x), dim=-1, eps=EPS)
