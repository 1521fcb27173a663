"""Losses: stateless functions, computed in fp32, batch size inferred."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mse(prediction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error over the hidden elements only; visible ones get no gradient.

    Args:
        prediction, target: (B, C, ...) of equal shape.
        hidden: bool, broadcastable to them; True = counted.

    Source: He et al. 2022, arXiv:2111.06377, section 3.
    """
    difference = prediction - target if prediction.dtype == torch.float64 else prediction.float() - target.float()
    difference = torch.where(hidden, difference, 0)  # not a product: NaN * 0 = NaN
    return difference.square().sum() / hidden.expand_as(difference).sum()
