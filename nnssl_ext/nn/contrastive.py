"""Contrast of the samples of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.nn import distributed
from nnssl_ext.nn.precision import wide

EPS = 1e-8  # of the norms: a vector of zeros stays one


def nt_xent(a: Tensor, b: Tensor, temperature: float, subjects: Sequence[int] | None = None) -> Tensor:
    """Mean over all 2N vectors, N samples of all ranks, of the cross-entropy of finding the other version of the same sample.

        -log(exp(cos(z_i, z_j) / T) / sum_{k != i} exp(cos(z_i, z_k) / T)), z_j the other version of z_i

    It is computed by logsumexp and stays finite for temperatures at which the exponentials do not. A vector without negatives
    costs 0: so does everything where there is one sample alone, or one subject.

    Args:
        a, b: two versions of each sample, (B, D); equal B on all ranks.
        temperature: T, above 0.
        subjects: of the B samples; other samples of the same subject are left out of the sum. None: every sample is its own.

    Returns:
        The same value on every rank; gradients are to be averaged over them, as DDP does.

    Source: Chen et al. 2020, arXiv:2002.05709, eq. 1.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = (F.normalize(wide(x), dim=1, eps=EPS) for x in (a, b))
        z = torch.cat((distributed.joined(a), distributed.joined(b)))
        count = len(z) // 2
        number = torch.arange(2 * count, device=z.device)
        other = (number + count) % (2 * count)
        apart = number[:, None] != number
        if subjects is not None:
            everybody = distributed.stacked(torch.tensor(subjects, device=z.device)).flatten().repeat(2)
            apart = everybody[:, None] != everybody
            apart[number, other] = True
        scores = z @ z.T / temperature
        loss = (scores.masked_fill(~apart, -torch.inf).logsumexp(1) - scores[number, other]).mean()
        return distributed.own_share(loss)


def rank_mean(x: Tensor) -> Tensor:
    """Mean over all ranks of a scalar, with its gradient: for a loss in which it is a factor of something else that all ranks share."""
    return distributed.own_share(distributed.joined(x[None]).mean())
