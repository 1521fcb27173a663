"""Losses of segmentations: stateless functions, computed in fp32 (fp64 for fp64)."""

from __future__ import annotations

import torch
from torch import Tensor

from nnssl_ext.nn.precision import wide


def dice_ce(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over the voxels, plus 1 - soft Dice.

    Dice = 2 sum(p t) / (sum(p) + sum(t)) is taken over the voxels of a sample for each class that the sample holds, whichever
    the class (0 as well), averaged over these and then over the samples: nothing has to be smoothed, no sample depends on another.

    Args:
        logits: (B, K, z, y, x).
        target: classes (B, z, y, x), whole numbers in [0, K).

    Source: Milletari et al. 2016, arXiv:1606.04797 (soft Dice, with the denominator of Isensee et al. 2021, doi:10.1038/s41592-020-01008-z).
    """
    log_p, axes = torch.log_softmax(wide(logits), 1), (2, 3, 4)
    is_class = target[:, None] == torch.arange(logits.shape[1], device=target.device).view(1, -1, 1, 1, 1)
    cross_entropy = -torch.where(is_class, log_p, 0).sum() / target.numel()
    p, count = log_p.exp(), is_class.sum(axes)
    dice = 2 * torch.where(is_class, p, 0).sum(axes) / (p.sum(axes) + count).clamp_min(1)
    held = count > 0
    return cross_entropy + 1 - (torch.where(held, dice, 0).sum(1) / held.sum(1)).mean()


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the voxels that have a class, averaged over those of a sample and then over the samples: no sample depends on another.

    A sample none of whose voxels has a class costs 0.

    Args:
        logits: (B, K, z, y, x).
        target: classes (B, z, y, x), whole numbers in [0, K), or -1 for a voxel without a class.
    """
    log_p, axes = torch.log_softmax(wide(logits), 1), (1, 2, 3, 4)
    is_class = target[:, None] == torch.arange(logits.shape[1], device=target.device).view(1, -1, 1, 1, 1)
    return -(torch.where(is_class, log_p, 0).sum(axes) / is_class.sum(axes).clamp_min(1)).mean()
