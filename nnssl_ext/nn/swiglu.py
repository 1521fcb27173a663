"""Gated MLPs that keep less for the backward pass."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute_gate(mlp: nn.Module) -> None:
    """Let a SwiGLU of timm compute activation, product and norm once more in the backward pass instead of keeping them.

    Values and gradients stay what they are, bit for bit; two of five tensors of the hidden width are saved, for no matrix product.

    Source: Chen et al. 2016, arXiv:1604.06174 (recomputation).
    """
    mlp.forward = MethodType(_forward, mlp)  # type: ignore[method-assign]


def _forward(mlp: Any, x: Tensor) -> Tensor:
    gate, value = mlp.fc1_g(x), mlp.fc1_x(x)

    def gated(gate: Tensor, value: Tensor) -> Tensor:
        return mlp.norm(mlp.drop1(mlp.act(gate) * value))  # type: ignore[no-any-return]

    kept = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # a compiler decides by itself what to keep
    hidden = checkpoint(gated, gate, value, use_reentrant=False, preserve_rng_state=mlp.drop1.p > 0) if kept else gated(gate, value)
    return mlp.drop2(mlp.fc2(hidden))  # type: ignore[no-any-return]
