"""Stochastic depth that doesn't compute what it drops."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def skip_dropped(block: nn.Module) -> None:
    """Let a transformer block of timm leave out the samples that its drop path drops, instead of multiplying them by 0.

    Numbers are drawn as timm draws them on the CPU, and results equal timm's; a tenth of the time and memory is saved at a mean
    rate of 0.1. At least one sample is always computed, so that every parameter has a gradient on every rank.

    Source: Huang et al. 2016, arXiv:1603.09382.
    """
    block.forward = MethodType(_forward, block)  # type: ignore[method-assign]


def _forward(block: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
    plain = attn_mask is not None or block.gamma_1 is None
    if plain or not block.training or torch.compiler.is_compiling():  # a compiler wants fixed shapes
        return type(block).forward(block, x, rope=rope, attn_mask=attn_mask)  # type: ignore[no-any-return]

    def attend(y: Tensor, rows: Tensor | None) -> Tensor:
        own = rope if rope is None or rows is None or rope.ndim < 4 else rope[rows]
        return block.gamma_1 * block.attn(block.norm1(y), rope=own)  # type: ignore[no-any-return]

    x = _add(x, block.drop_path1, attend)
    return _add(x, block.drop_path2, lambda y, _: block.gamma_2 * block.mlp(block.norm2(y)))


def _add(x: Tensor, drop_path: nn.Module, branch: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
    """x + drop_path(branch(x)); `branch` is told which samples of the batch it gets, None for all of them."""
    rate = float(getattr(drop_path, "drop_prob", 0.0) or 0.0)
    if not rate:
        return x + branch(x, None)
    kept = torch.empty(len(x), dtype=x.dtype if x.device.type == "cpu" else torch.float32, device="cpu").bernoulli_(1 - rate).nonzero()[:, 0]
    scale = 1 / (1 - rate) if len(kept) else 0.0
    if len(kept) == len(x):
        return x + scale * branch(x, None)
    rows = (kept if len(kept) else torch.zeros(1, dtype=torch.long)).to(x.device)
    return x.index_add(0, rows, branch(x[rows], rows).to(x.dtype), alpha=scale)
