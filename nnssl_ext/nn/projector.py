"""Perceptrons on top of an encoder, with batch normalisation over all processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnssl_ext.nn import distributed
from nnssl_ext.nn.precision import wide

EPS = 1e-5  # added to variances, as batch normalisation does


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of vectors (B, D) over the batches of all processes, on any device, in single precision.

    Every process needs the same B. Gradients pass through the common moments; averaged over the processes, as DDP does, they are
    those of one process with the whole batch.

    Raises:
        ValueError: there is one vector in all while training.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = wide(x)
            return super().forward(x) if distributed.ranks() == 1 or not self.training else self._over_ranks(x)

    def _over_ranks(self, x: Tensor) -> Tensor:
        count = len(x) * distributed.ranks()
        mean, variance = moments(x)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None and self.momentum is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        x = (x - mean) * (variance + self.eps).rsqrt()
        return x * self.weight + self.bias if self.affine else x


class Standardize(nn.Module):
    """Vectors (B, D) to mean 0 and variance 1 of each dimension over the batches of all processes, in training and in evaluation: nothing is remembered."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = wide(x)
            mean, variance = moments(x)
            return (x - mean) * (variance + EPS).rsqrt()


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (D,) of the vectors (B, D) of all processes, of which each has as many; with gradient."""
    count = len(x) * distributed.ranks()
    mean = distributed.summed(x.sum(0)) / count
    return mean, distributed.summed((x - mean).square().sum(0)) / count


def normalized_mlp(widths: Sequence[int], *, last: bool) -> nn.Sequential:
    """Linear layers between these widths, with batch normalisation and ReLU between them.

    Args:
        last: normalise the output, too (without gain and offset).

    Source: Chen & He 2021, arXiv:2011.10566, section 3.
    """
    layers: list[nn.Module] = []
    for before, after in zip(widths[:-2], widths[1:]):
        layers += [nn.Linear(before, after, bias=False), BatchNorm(after), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=not last))
    return nn.Sequential(*layers, *[BatchNorm(widths[-1], affine=False)] * last)
