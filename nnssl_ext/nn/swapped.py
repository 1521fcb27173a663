"""Swapped prediction: what one view's vectors are assigned to is predicted from the other view's."""

from __future__ import annotations

import torch
from torch import Tensor

from nnssl_ext.nn import assign
from nnssl_ext.nn.losses import cross_entropy_to
from nnssl_ext.nn.precision import wide


def swapped_prediction(first: Tensor, second: Tensor, directions: Tensor, temperature: float = 0.1, sharpness: float = 0.05) -> Tensor:
    """Mean over all vectors of both views of -sum_k q_k log p_k: p of a vector itself, q of the vector at the same place of the other view.

    p = softmax(cosines / temperature); q, without gradient, is the assignment that uses all prototypes equally, by each view over
    the vectors of all processes. Without that balance, a single prototype for everything would be a perfect solution.

    Args:
        first, second: unit vectors (n, D) of corresponding places; equal n on all ranks.
        directions: prototypes as unit vectors, (K, D).
        temperature: of the predictions.
        sharpness: temperature of the assignments; below the other one, so that they are more decided.

    Returns:
        this rank's mean, to be averaged over the ranks as DDP does.

    Source: Caron et al. 2020, arXiv:2006.09882, eq. 2-4.
    """
    with torch.autocast(first.device.type, enabled=False):
        first, second, directions = wide(first), wide(second), wide(directions)
        cosines = [(view @ directions.T).detach() for view in (second, first)]
        assigned = torch.cat([assign.probabilities(x, sharpness, *assign.sinkhorn(x, sharpness)) for x in cosines])
        weights = assigned.new_full((len(assigned),), 1 / len(assigned))
        return cross_entropy_to(torch.cat((first, second)), directions, assigned.__getitem__, weights, temperature)
