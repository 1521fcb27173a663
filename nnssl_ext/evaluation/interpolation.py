"""Trilinear interpolation of many channels at few places, and its gradient by the places: what instance optimisation spends its time with.

Shape suffixes: V voxels, N places, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CORNERS = tuple(product((0, 1), repeat=3))


class Interpolated(torch.autograd.Function):
    """`Interpolated.apply(places, values, shape)`: values (V, C) of a volume of `shape` at places (3, N), voxels, as (N, C); outside the nearest voxel counts.

    The channels of a voxel lie together and the eight corners are added in one go, several times as fast as sampling channel by channel. There is a
    gradient by the places alone, 0 along an axis on whose faces a place has been drawn.
    """

    @staticmethod
    def forward(ctx: Any, places: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
        last = places.new_tensor([n - 1 for n in shape]).view(3, 1)
        inside = torch.minimum(places.clamp_min(0), last)
        low = torch.minimum(inside.floor(), (last - 1).clamp_min(0))
        steps = (shape[1] * shape[2], shape[2], 1)
        first = sum(axis * step for axis, step in zip(low.long(), steps))
        beyond = torch.tensor([sum(b * step * (n > 1) for b, step, n in zip(corner, steps, shape)) for corner in _CORNERS], device=places.device)
        index = first[:, None] + beyond
        share = inside - low
        ctx.save_for_backward(values, index, share, places == inside)
        return F.embedding_bag(index, values, per_sample_weights=_weights((1 - share, share)), mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        values, index, share, free = ctx.saved_tensors
        parts = []
        for axis in range(3):
            sides = [1 - share, share.clone()]
            sides[0][axis], sides[1][axis] = -1, 1
            slope = F.embedding_bag(index, values, per_sample_weights=_weights(sides), mode="sum")
            parts.append((slope * gradient).sum(1))
        return torch.stack(parts) * free, None, None


def _weights(sides: Sequence[Tensor]) -> Tensor:
    """Of the eight corners, (N, 8), from those of both sides of each axis, two of (3, N). Multiplied along N and turned after that: eight times as fast."""
    z, y, x = torch.stack(tuple(sides), 1)
    return (z[:, None, None] * y[:, None] * x).flatten(0, 2).T.contiguous()
