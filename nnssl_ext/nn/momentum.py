"""A teacher that follows its student as an exponential moving average."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_ext.nn.distributed import local


class MomentumTeacher(nn.Module):
    """A copy of a module, heads included, that is never trained: it starts as the student and then follows it slowly.

    It stays in evaluation mode (no drop path, no dropout), also when the model around it trains. Call `update` once per
    optimiser step, however many batches a step accumulates.

    Args:
        student: what to copy.

    Source: Tarvainen & Valpola 2017, arXiv:1703.01780.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(student).requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> MomentumTeacher:
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """What the copied module returns, without a graph."""
        return self.net(*arguments, **keywords)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student.

        Parameters and floating-point buffers (running statistics) are averaged, buffers of integers are copied.

        Args:
            student: the module that was copied.
            momentum: in [0, 1].
        """
        mine, theirs = _tensors(self.net), _tensors(student)
        floats = [(a, b) for a, b in zip(mine, theirs, strict=True) if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1.0 - momentum)
        for a, b in zip(mine, theirs):
            if not a.is_floating_point():
                a.copy_(b)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*(local(parameter.detach()) for parameter in module.parameters()), *module.buffers()]


@torch.no_grad()
def distance(student: nn.Module, teacher: nn.Module) -> Tensor:
    """||student - teacher|| / ||student|| over all parameters (of a sharded model: this process's share), a scalar on their device."""
    mine, theirs = [local(p.detach()) for p in student.parameters()], [local(p.detach()) for p in teacher.parameters()]
    norms = torch._foreach_norm(torch._foreach_sub(mine, theirs)), torch._foreach_norm(mine)
    apart, size = (torch.stack([n.float() for n in norm]).norm() for norm in norms)
    return apart / size.clamp_min(torch.finfo(torch.float32).tiny)
