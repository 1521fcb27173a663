"""Losses: stateless functions, computed in fp32 (fp64 for fp64), batch size inferred."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnssl_ext.nn import assign, distributed
from nnssl_ext.nn.precision import wide
from nnssl_ext.nn.tokens import gather

EPS = 1e-8  # distances in `koleo`


def masked_mse(prediction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error over the hidden elements only; visible ones get no gradient.

    Args:
        prediction, target: (B, C, ...) of equal shape.
        hidden: bool, broadcastable to them; True = counted.

    Source: He et al. 2022, arXiv:2111.06377, section 3.
    """
    return _hidden_mean(prediction, target, hidden, torch.square)


def masked_l1(prediction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Mean absolute error over the hidden elements only; arguments as of `masked_mse`.

    Source: Xie et al. 2022, arXiv:2111.09886, section 3.4.
    """
    return _hidden_mean(prediction, target, hidden, torch.abs)


def _hidden_mean(prediction: Tensor, target: Tensor, hidden: Tensor, cost: Callable[[Tensor], Tensor]) -> Tensor:
    difference = wide(prediction) - wide(target)
    difference = torch.where(hidden, difference, 0)  # not a product: NaN * 0 = NaN
    return cost(difference).sum() / hidden.expand_as(difference).sum()


def cross_entropy_to(z: Tensor, directions: Tensor, targets: Callable[[slice], Tensor], weights: Tensor, temperature: float = 0.1) -> Tensor:
    """Weighted sum over vectors of the cross-entropy between given probabilities and softmax(z . directions / temperature).

    Never holds a whole matrix (n, K): loss and gradients are computed together, a few rows at a time, and backward only scales
    them. Matrix products are in the type of autocast where that is on, everything else in single precision.

    Args:
        z: (n, D); with n = 0 the loss is 0 and has gradients of zeros.
        directions: (K, D).
        targets: probabilities (rows, K) of some of the rows; they may sum to more than 1 and have no gradient. Each is read
            before the next is asked for, and never written to.
        weights: (n,), without gradient.

    Returns:
        sum_i weights_i * -sum_k targets_ik log softmax(z_i . directions / temperature)_k
    """
    trained = torch.is_grad_enabled()
    return _CrossEntropy.apply(z, directions, targets, weights, temperature, trained)  # type: ignore[no-any-return]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, directions: Tensor, targets: Callable[[slice], Tensor], weights: Tensor, temperature: float, trained: bool) -> Tensor:
        kind, device = wide(z).dtype, z.device
        narrow = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) and kind is torch.float32 else kind
        n, moved, turned = len(z), trained and ctx.needs_input_grad[0], trained and ctx.needs_input_grad[1]
        with torch.autocast(device.type, enabled=False):
            weights = weights.to(kind)
            scale = weights[:, None] / -temperature
            scaled = z.to(kind) * (scale * n)  # n: near 1 also in half precision
            vectors, prototypes, scaled = (x.to(narrow) for x in (z.to(kind) / temperature, directions, scaled))
            loss = torch.zeros((), dtype=kind, device=device)
            grad_z = torch.empty_like(z, dtype=kind) if moved else None
            grad_directions = torch.zeros_like(directions, dtype=kind) if turned else None
            for rows in assign.chunks(n, len(directions), device):
                target = targets(rows).to(kind)
                log_p = torch.log_softmax(vectors[rows] @ prototypes.T, 1, dtype=kind)
                loss -= (weights[rows] * (target * log_p).sum(1)).sum()
                if not (moved or turned):
                    continue
                gradient = torch.addcmul(target, log_p.exp_(), target.sum(1, keepdim=True), value=-1, out=log_p).to(narrow)  # target - p
                if grad_z is not None:
                    grad_z[rows] = (gradient @ prototypes).to(kind) * scale[rows]
                if grad_directions is not None:
                    _add_product(grad_directions, gradient.T, scaled[rows])
            if grad_directions is not None:
                grad_directions /= max(1, n)
        ctx.gradients = grad_z, grad_directions
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if gradient is None else gradient * grad for gradient in ctx.gradients), None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a matrix in between where the types agree."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        total += a @ b


def dino_loss(z: Tensor, directions: Tensor, p: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean cross-entropy over the pairs of a global view of the teacher and another view of the student.

    The cross-entropy is linear in its target, hence every vector of the student is compared once: a global view with the other
    one, a local view with the sum of both.

    Args:
        z: (views * B, D): all B samples of the first global view, then of the second, then of each local view.
        directions: (K, D).
        p: the teacher's probabilities of its two views, (2, B, K).

    Source: Caron et al. 2021, arXiv:2104.14294, eq. 3.
    """
    batch, views = p.shape[1], len(z) // p.shape[1]
    table = torch.cat((p[1], p[0], p[0] + p[1]))

    def targets(rows: slice) -> Tensor:
        row = torch.arange(rows.start, rows.stop, device=z.device)
        return table[torch.where(row < 2 * batch, row, 2 * batch + row % batch)]

    pairs = 2 * (views - 1)
    return cross_entropy_to(z, directions, targets, table.new_full((len(z),), 1 / (batch * pairs)), temperature)


def ibot_weights(mask: Tensor, hidden: Tensor) -> Tensor:
    """Weight of each hidden token: 1 / (crops * hidden tokens of its crop), so that every crop with a mask counts the same.

    Args:
        mask: bool (crops, tokens), True = hidden; all global crops, those without a mask included, which contribute nothing.
        hidden: (M,), flat indices of its True.
    """
    return 1 / (len(mask) * mask.sum(1, dtype=torch.float32))[hidden // mask.shape[1]]


def ibot_loss(z: Tensor, directions: Tensor, targets: Callable[[slice], Tensor], weights: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean over all global crops of the mean cross-entropy over their hidden tokens; `cross_entropy_to` with these weights.

    Args:
        z: (M, D) of the student's hidden tokens.
        directions: (K, D).
        targets: the teacher's probabilities of the same tokens (`assign.targets`).
        weights: (M,), from `ibot_weights`.

    Source: Zhou et al. 2021, arXiv:2111.07832, eq. 2; Oquab et al. 2023, arXiv:2304.07193, section 4.
    """
    return cross_entropy_to(z, directions, targets, weights, temperature)


def koleo(x: Tensor) -> Tensor:
    """Minus the mean log-distance of the normalised vectors to their nearest neighbours among those of all processes.

    Every process returns the same value. Gradients are to be averaged over the processes, as DDP and FSDP do. Identical vectors
    have a gradient of zero. With fewer than two vectors the loss is 0.

    Args:
        x: (n, D); processes may have different numbers of them, or none.

    Source: Sablayrolles et al. 2019, arXiv:1806.03198, eq. 3; Oquab et al. 2023, arXiv:2304.07193, section 4.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(wide(x), dim=1, eps=EPS)
        everybody = distributed.joined(x)
        if len(everybody) < 2:
            return x.sum() * 0
        with torch.no_grad():
            nearest = (everybody @ everybody.T).fill_diagonal_(-2).argmax(1)
        distance = ((everybody - everybody[nearest]).square().sum(1) + EPS**2).sqrt()
        return distributed.own_share(-(distance + EPS).log().mean())


def gram_loss(student: Tensor, teacher: Tensor, index: Tensor) -> Tensor:
    """Mean squared difference of the cosines between all pairs of some tokens of a crop, of the student and of the teacher.

    The mean over pairs where the source has their sum: the loss does not grow with the number of tokens.

    Args:
        student: tokens, (B, N, C).
        teacher: of the same crops, (B, N, C) or of another width; without gradient.
        index: which tokens of each crop, (B, K).

    Source: Siméoni et al. 2025, arXiv:2508.10104, section 4.2.
    """
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = (F.normalize(wide(gather(x, index)), dim=2, eps=EPS) for x in (student, teacher.detach()))
        return (ours @ ours.mT - theirs @ theirs.mT).square().mean()
