"""One optimiser step: forward and backward over its micro-batches, clipping, and a guard against numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn import distributed
from nnssl_ext.trainers.signals import StopSignals

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Outcome:
    """What became of a step.

    Args:
        values: mean losses over the micro-batches.
        norm: of the whole gradient before clipping.
        applied: False where the step was skipped because something was not finite (on any rank).
        signal: number of the stop signal that reached any rank, or 0.
        scale: of the loss, in fp16.
    """

    values: dict[str, float]
    norm: float
    applied: bool
    signal: int
    scale: float = 1.0


class Updater:
    """Runs optimiser steps.

    Args:
        model: the module to call, wrapped for several processes or not.
        optimizer: its optimiser; parameter groups with the same "part" (a name) form a part, those without one another.
        losses: of the model and a batch, by name; "total" is optimised.
        config: the trainer's; `precision` ("fp32", "bf16", "fp16", or "auto": bf16 on CUDA, fp32 on the CPU) and `accumulate`,
            micro-batches per step, count here.
        clip: largest norm of the gradient of each part.
        signals: that may stop the run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        losses: Callable[[nn.Module, Any], dict[str, Tensor]],
        device: torch.device,
        config: Any,
        *,
        clip: float,
        signals: StopSignals,
    ) -> None:
        precision = config.precision
        if precision not in (*PRECISIONS, "auto"):
            raise UserError(f"unknown precision '{precision}'", "option -o precision", f"known: auto, {', '.join(PRECISIONS)}")
        self.model, self.optimizer, self.losses, self.device = model, optimizer, losses, device
        self.dtype = PRECISIONS["bf16" if device.type == "cuda" else "fp32"] if precision == "auto" else PRECISIONS[precision]
        self.clip, self.accumulate, self.signals = clip, config.accumulate, signals
        self.buffers = list(model.buffers())  # running statistics, queues, centres
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    def autocast(self) -> Any:
        """The context in which losses are computed."""
        return torch.autocast(self.device.type, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def __call__(self, batches: Iterable[Any], seeds: Iterable[int]) -> Outcome:
        """One step; weights, buffers and optimiser stay as they were when something is not finite.

        Args:
            batches: the step's micro-batches, on the device.
            seeds: of each one's random numbers (dropout and the like).
        """
        self.optimizer.zero_grad(set_to_none=True)
        scale = self.scaler.get_scale()
        before = [buffer.clone() for buffer in self.buffers]
        sums: dict[str, Any] = {}
        for number, (batch, seed) in enumerate(zip(batches, seeds), 1):
            torch.manual_seed(seed)
            last = number == self.accumulate or not isinstance(self.model, DistributedDataParallel)
            with nullcontext() if last else self.model.no_sync():  # type: ignore[operator]
                with self.autocast():
                    losses = self.losses(self.model, batch)
                self.scaler.scale(losses["total"] / self.accumulate).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double() / self.accumulate
        self.scaler.unscale_(self.optimizer)
        read = torch.stack([*sums.values(), *self._clip()]).tolist()  # the only wait for the device
        values, norm = dict(zip(sums, read)), math.hypot(*read[len(sums) :])
        finite = math.isfinite(values["total"]) and math.isfinite(norm)
        broken, signal = distributed.largest([float(not finite), float(self.signals.received)], self.device)
        if not broken:
            self.scaler.step(self.optimizer)
        else:
            for buffer, former in zip(self.buffers, before):
                buffer.copy_(former)
        self.scaler.update()
        return Outcome(values, norm, not broken, int(signal), scale)

    def _clip(self) -> list[Tensor]:
        """Clip the gradient of each part by its own norm; these norms, before."""
        parts: dict[str, list[nn.Parameter]] = {}
        for group in self.optimizer.param_groups:
            parts.setdefault(group.get("part", ""), []).extend(group["params"])
        norms: list[Any] = [nn.utils.clip_grad_norm_(parameters, self.clip) for parameters in parts.values()]
        return [(norm.full_tensor() if hasattr(norm, "full_tensor") else norm).to(self.device, torch.float64) for norm in norms]  # of all shards
