"""K-means: starts by k-means++, Lloyd's iterations over all samples. Shape suffixes: N samples, D dimensions, K clusters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn.assign import chunks

ITERATIONS, TOLERANCE = 300, 1e-4  # at most; squared movement of all centres at which they rest, over the mean variance of a dimension (scikit-learn's)


@dataclass(frozen=True)
class Clusters:
    """K-means of samples.

    Args:
        centres: (K, D), of the largest cluster first.
        counts: samples of each cluster, (K,).
        inertia: sum over the samples of the squared distance to the nearest centre.
    """

    centres: Tensor
    counts: Tensor
    inertia: float


def kmeans(x_ND: Tensor, classes: int, rng: np.random.Generator, starts: int = 5) -> Clusters:
    """The clusters with the lowest inertia of several starts.

    Args:
        x_ND: samples, all of which count in every iteration; centred, so that distances are exact.
        classes: K.
        rng: draws the starts.
        starts: how many.

    Raises:
        UserError: there are fewer than K different samples.

    Source: Lloyd 1982, doi:10.1109/TIT.1982.1056489; Arthur & Vassilvitskii 2007, k-means++ (starts).
    """
    return min((lloyd(x_ND, plus_plus(x_ND, classes, rng)) for _ in range(starts)), key=lambda found: found.inertia)


def plus_plus(x_ND: Tensor, classes: int, rng: np.random.Generator) -> Tensor:
    """Samples as first centres (K, D): each is drawn with a probability in proportion to its squared distance from the nearest one that was drawn before.

    Raises:
        UserError: there are fewer than K different samples.
    """
    chosen = [int(rng.integers(len(x_ND)))]
    distance_N = _squared(x_ND, x_ND[chosen[0]])
    while len(chosen) < classes:
        sums_N = distance_N.cumsum(0)
        if not sums_N[-1] > 0:
            raise UserError(f"there are only {len(chosen)} different samples for {classes} clusters", "option -k", f"choose at most {len(chosen)}")
        place = torch.searchsorted(sums_N, sums_N.new_tensor([rng.random()]) * sums_N[-1], right=True)
        chosen.append(min(int(place), len(x_ND) - 1))
        distance_N = torch.minimum(distance_N, _squared(x_ND, x_ND[chosen[-1]]))
    return x_ND[chosen]


def lloyd(x_ND: Tensor, centres_KD: Tensor) -> Clusters:
    """Each sample goes to the nearest centre, each centre to the mean of its samples, until the centres rest. A centre without samples stays."""
    moved, rest = torch.inf, TOLERANCE * x_ND.double().var(0, correction=0).mean().item()
    for _ in range(ITERATIONS):
        sums_KD, counts_K = _sums(x_ND, nearest(x_ND, centres_KD), len(centres_KD))
        means_KD = torch.where(counts_K[:, None] > 0, sums_KD / counts_K.clamp_min(1)[:, None], centres_KD.double())
        moved, centres_KD = (means_KD - centres_KD).square().sum().item(), means_KD.to(x_ND.dtype)
        if moved <= rest:
            break
    labels_N = nearest(x_ND, centres_KD)
    inertia = sum(float((x_ND[rows].double() - centres_KD[labels_N[rows]]).square().sum()) for rows in _rows(x_ND))
    counts_K = labels_N.bincount(minlength=len(centres_KD))
    order = counts_K.argsort(descending=True, stable=True)
    return Clusters(centres_KD[order], counts_K[order], inertia)


def nearest(x_ND: Tensor, centres_KD: Tensor) -> Tensor:
    """Index of the nearest centre of each sample, (N,); of several the first."""
    half_K = centres_KD.square().sum(1) / 2
    return torch.cat([(x_ND[rows] @ centres_KD.T - half_K).argmax(1) for rows in _rows(x_ND)])


def _sums(x_ND: Tensor, labels_N: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sum (K, D) and number (K,) of the samples of each cluster, in double precision."""
    sums = x_ND.new_zeros(classes, x_ND.shape[1], dtype=torch.float64)
    for rows in _rows(x_ND):
        sums += F.one_hot(labels_N[rows], classes).T.double() @ x_ND[rows].double()
    return sums, labels_N.bincount(minlength=classes).double()


def _squared(x_ND: Tensor, centre_D: Tensor) -> Tensor:
    """Squared distance of each sample from a point, (N,) in double precision; exactly 0 for the point itself."""
    return torch.cat([(x_ND[rows] - centre_D).double().square().sum(1) for rows in _rows(x_ND)])


def _rows(x_ND: Tensor) -> Iterator[slice]:
    return chunks(len(x_ND), x_ND.shape[1], x_ND.device)
