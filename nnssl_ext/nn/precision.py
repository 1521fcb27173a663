"""Precision of what must not be computed in half precision."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """In single precision; double precision stays."""
    return x if x.dtype == torch.float64 else x.float()
