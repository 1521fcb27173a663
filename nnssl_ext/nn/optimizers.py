"""PyTorch's optimisers without its compiler.

PyTorch wraps the methods of an optimiser so that torch.compile leaves them alone, and each wrapper imports the compiler:
3.4 CPU seconds and 150 MB in every process, also where nothing is compiled. What is wrapped is the same.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.optim import Optimizer


class _Eager(Optimizer):
    """To be the first base of an optimiser."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


class SGD(_Eager, torch.optim.SGD):
    step: Any = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class AdamW(_Eager, torch.optim.AdamW):
    step: Any = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
