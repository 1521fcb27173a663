"""Assignment of a teacher's vectors to prototypes: probabilities that neither one prototype nor all of them at once can win.

Every assignment is p_ik = exp(logits_ik / temperature + row_i + column_k) with rows that sum to 1, and is described by its two
potentials, so that probabilities are evaluated where they are used, a few rows at a time. Shape suffixes: n vectors of this
process, K prototypes. Logits may be of any floating-point type; everything else is in single precision (double for double).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from nnssl_ext.nn import distributed
from nnssl_ext.nn.precision import wide

ELEMENTS = 2**22  # of a matrix (rows, K) that is computed at once
ELEMENTS_ON_GPU = 2**25


def chunks(count: int, classes: int, device: torch.device) -> Iterator[slice]:
    """Consecutive rows of a matrix (count, classes) on a device, few enough to be computed at once."""
    rows = max(1, (ELEMENTS if device.type == "cpu" else ELEMENTS_ON_GPU) // classes)
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


@torch.no_grad()
def sinkhorn(logits_nK: Tensor, temperature: float, iterations: int = 3) -> tuple[Tensor, Tensor]:
    """Potentials of the assignment that uses all prototypes equally, over the vectors of all processes.

    Columns and rows of exp(logits / temperature) are scaled in turn to equal sums, in the log domain: no logits overflow.

    Args:
        logits_nK: cosines of the teacher's vectors and the prototypes; processes may have different numbers of them, or none.
        iterations: over columns and rows.

    Returns:
        row (n,), column (K,).

    Source: Cuturi 2013, arXiv:1306.0895; Caron et al. 2020, arXiv:2006.09882, section 3.1.
    """
    classes = logits_nK.shape[1]
    row, column = wide(logits_nK.new_zeros(len(logits_nK))), wide(logits_nK.new_zeros(classes))
    for _ in range(iterations):
        sums = distributed.stacked(_column_log_sums(logits_nK, temperature, row)).logsumexp(0)
        column = (-math.log(classes) - sums).masked_fill_(sums.isneginf(), 0.0)  # no vectors at all
        row = _row_potential(logits_nK, temperature, column)
    return row, column


class Centre(nn.Module):
    """Running mean of the logits, which softmax centring subtracts.

    Everything that changes is a buffer and equal in all processes, also between the batches of a step.

    Args:
        classes: K.
        momentum: of the mean, per optimiser step.

    Source: Caron et al. 2021, arXiv:2104.14294, eq. 4.
    """

    def __init__(self, classes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        for name, size in (("value", classes), ("sum", classes), ("count", 1)):
            self.register_buffer(name, torch.zeros(size))
        self.value: Tensor
        self.sum: Tensor
        self.count: Tensor

    @torch.no_grad()
    def add(self, logits_nK: Tensor) -> None:
        """Collect the logits of a batch, over all processes."""
        own = torch.cat((logits_nK.sum(0, dtype=self.sum.dtype), self.count.new_full((1,), len(logits_nK))))
        total = distributed.stacked(own).sum(0)
        self.sum += total[:-1]
        self.count += total[-1:]

    @torch.no_grad()
    def update(self) -> None:
        """Once per optimiser step: centre <- momentum * centre + (1 - momentum) * mean of what was collected."""
        self.value.lerp_(self.sum / self.count.clamp_min(1), (1 - self.momentum) * (self.count > 0).to(self.value.dtype))
        self.sum.zero_()
        self.count.zero_()

    @torch.no_grad()
    def potentials(self, logits_nK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Row (n,) and column (K,) of softmax((logits - centre) / temperature)."""
        column = self.value.to(wide(logits_nK[:0]).dtype) / -temperature
        return _row_potential(logits_nK, temperature, column), column


@torch.no_grad()
def softmax(logits_nK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Row (n,) and column (K,) of softmax(logits / temperature): nothing balances the prototypes."""
    column = wide(logits_nK.new_zeros(logits_nK.shape[1]))
    return _row_potential(logits_nK, temperature, column), column


@torch.no_grad()
def probabilities(logits_nK: Tensor, temperature: float, row: Tensor, column: Tensor, out: Tensor | None = None) -> Tensor:
    """exp(logits / temperature + row + column), (n, K).

    Args:
        out: (n, K), to write to.
    """
    return torch.add(column, logits_nK, alpha=1 / temperature, out=out).add_(row[:, None]).exp_()


def targets(logits_nK: Tensor, temperature: float, row: Tensor, column: Tensor) -> Callable[[slice], Tensor]:
    """Probabilities of some rows at a time; each call writes over what the last one returned."""
    buffer = column.new_empty(0, logits_nK.shape[1])

    def of(rows: slice) -> Tensor:
        nonlocal buffer
        count = rows.stop - rows.start
        if len(buffer) < count:
            buffer = column.new_empty(count, logits_nK.shape[1])
        return probabilities(logits_nK[rows], temperature, row[rows], column, buffer[:count])

    return of


def _chunks_of(x_nK: Tensor) -> Iterator[slice]:
    return chunks(x_nK.shape[0], x_nK.shape[1], x_nK.device)


def _row_potential(logits_nK: Tensor, temperature: float, column: Tensor) -> Tensor:
    """Minus the log-sums of the rows of exp(logits / temperature + column), (n,)."""
    found = [_log_sum(torch.add(column, logits_nK[rows], alpha=1 / temperature), 1) for rows in _chunks_of(logits_nK)]
    return -torch.cat(found) if found else column.new_zeros(0)


def _column_log_sums(logits_nK: Tensor, temperature: float, row: Tensor) -> Tensor:
    """Log-sums of the columns of exp(logits / temperature + row) over this process's vectors, (K,)."""
    total = row.new_full(logits_nK.shape[1:], -math.inf)
    for rows in _chunks_of(logits_nK):
        total = torch.logaddexp(total, _log_sum(torch.add(row[rows, None], logits_nK[rows], alpha=1 / temperature), 0))
    return total


def _log_sum(x: Tensor, axis: int) -> Tensor:
    """Log-sum-exp that writes over its input."""
    top = x.amax(axis, keepdim=True)
    return x.sub_(top).exp_().sum(axis).log_().add_(top.squeeze(axis))
