"""Schedules: closed forms of the number of the optimiser step, so that a continued run needs to remember nothing.

Steps count from 0; micro-batches of an accumulated step do not count. A schedule keeps its last value after its end.
"""

from __future__ import annotations

import math


def polynomial(step: int, total: int, start: float, warmup: int = 0, power: float = 0.9) -> float:
    """Linear warm-up over `warmup` steps to `start`, then polynomial decay to 0 at `total` steps."""
    if step < warmup:
        return start * (step + 1) / warmup
    return start * max(0.0, 1 - (step - warmup) / max(1, total - warmup)) ** power


def cosine(step: int, total: int, start: float, end: float, warmup: int = 0) -> float:
    """Linear warm-up over `warmup` steps to `start`, then half a cosine to `end` at `total` steps.

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5 (one period).
    """
    if step < warmup:
        return start * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return end - (end - start) * (1 + math.cos(math.pi * share)) / 2


def linear(step: int, steps: int, start: float, end: float) -> float:
    """From `start` at step 0 straight to `end` at step `steps` and after it."""
    return end if step >= steps else start + (end - start) * step / steps
