"""Repeats a captured step that was not finite, and finds where that begins."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import write_json
from nnssl_ext.data.loader import Batch
from nnssl_ext.trainers.base import SSLTrainer
from nnssl_ext.trainers.checkpoint import load_checkpoint
from nnssl_ext.trainers.update import Outcome

FIRST = -1  # instead of a step's number: the first capture of the run


@dataclass
class Trace:
    """The first of each kind that was not finite, in the order of computation; None or empty where all were finite."""

    views: list[dict[str, Any]] = field(default_factory=list)  # name of the view, case, how many values
    module: dict[str, Any] | None = None  # its name, type, whether its inputs were finite, their largest magnitude
    gradient: str | None = None  # name of the parameter

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Look at the output of every module and the gradient of every parameter."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                stack.callback(module.register_forward_hook(partial(self._output, name)).remove)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    stack.callback(parameter.register_post_accumulate_grad_hook(partial(self._gradient, name)).remove)
            yield

    def look_at(self, batch: Batch, identifiers: list[str]) -> None:
        for name, view in batch.items():
            for image, case in zip(view.image, view.cases):
                if count := int((~image.isfinite()).sum()):
                    self.views.append({"view": name, "case": identifiers[case], "values": count})

    def _output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.module is None and not all(tensor.isfinite().all() for tensor in _tensors(output)):
            sources = list(_tensors(inputs))
            finite = all(bool(tensor.isfinite().all()) for tensor in sources)
            largest = max((float(tensor.detach().abs().max()) for tensor in sources if tensor.numel()), default=0.0)
            self.module = {"name": name or "the model itself", "type": type(module).__name__, "inputs_finite": finite, "largest_input": _plain(largest)}

    def _gradient(self, name: str, parameter: Tensor) -> None:
        if self.gradient is None and parameter.grad is not None and not parameter.grad.isfinite().all():
            self.gradient = name

    def verdict(self, outcome: Outcome) -> str:
        """Where it begins, in a sentence."""
        losses = [name for name, value in outcome.values.items() if not math.isfinite(value)]
        if outcome.applied:
            return "the step is finite here"
        if self.views:
            seen = ", ".join(f"view '{view['view']}' of {view['case']} ({view['values']} values)" for view in self.views[:3])
            return f"it begins in the input: {seen}; check that case with nnssl_verify"
        if self.module is not None:
            where = f"it begins in the output of {self.module['name']} ({self.module['type']}), largest input {float(self.module['largest_input']):g}"
            return where + ("" if self.module["inputs_finite"] else "; what it was given was not finite, and no module made that")
        if losses:
            return f"it begins in the loss '{losses[0]}': the outputs of all modules are finite"
        if self.gradient is not None:
            scaled = f"; the loss was scaled by {outcome.scale:g}, which fp16 lowers by itself in the next steps" if outcome.scale > 1 else ""
            return f"it begins in the backward pass: the first gradient is that of {self.gradient}, all losses are finite{scaled}"
        return "it begins in the norm of the gradient: every gradient is finite, the sum of their squares is not"


def replay(trainer: SSLTrainer, step: int = FIRST) -> bool:
    """Repeat a captured step with its weights, batches and random numbers; nonfinite_step_N.json beside it says what was found.

    The step of several processes is repeated in this one, process after process, up to the first that is not finite.

    Args:
        trainer: of the run, not initialized.
        step: its number.

    Returns:
        whether it was not finite again.

    Raises:
        UserError: there is no such capture, or it is of another run.
    """
    file = _capture(trainer.folder, step)
    content = load_checkpoint(file)
    plainly = {name: False for name in ("compile", "recompute") if hasattr(trainer.config, name)}  # modules are looked at one by one
    trainer.config = dataclasses.replace(trainer.config, **plainly)
    trainer.initialize()
    trainer.ranks = content["ranks"]
    for rank in range(trainer.ranks):
        trainer.rank, trainer.waited = rank, 0.0
        trainer.load(content, file)
        if content["scaler_state"]:
            trainer.update.scaler.load_state_dict(content["scaler_state"] | {"scale": content["loss_scale"]})
        trace = Trace()
        with trace.watching(trainer.model):
            outcome = trainer._update(trainer.next_step, _batches(trainer, trace))
        if not outcome.applied:
            break
    losses = {name: _plain(value) for name, value in outcome.values.items()}
    report = {"step": content["step"], "process": trainer.rank, "reproduced": not outcome.applied, "verdict": trace.verdict(outcome)}
    report |= {"views": trace.views, "module": trace.module, "losses": losses, "gradient": trace.gradient, "norm": _plain(outcome.norm)}
    report |= {"captured": {"losses": {name: _plain(value) for name, value in content["losses"].items()}, "norm": _plain(content["norm"])}}
    report |= {"loss_scale": outcome.scale, "precision": trainer.config.precision, "device": str(trainer.device), "versions": content["versions"]}
    write_json(file.with_suffix(".json"), report)
    _show(report, file)
    return not outcome.applied


def _batches(trainer: SSLTrainer, trace: Trace) -> Iterator[Batch]:
    data, accumulate = trainer._dataset(trainer.train_cases, "train"), trainer.config.accumulate
    for number in range(trainer.next_step * accumulate, (trainer.next_step + 1) * accumulate):
        batch = data[number]
        trace.look_at({name: view.to(torch.device("cpu")) for name, view in batch.items()}, trainer.store.identifiers)
        yield batch


def _capture(folder: Path, step: int) -> Path:
    captures = sorted(folder.glob("nonfinite_step_*.pth"))
    found = captures[:1] if step == FIRST else [file for file in captures if int(file.stem.rpartition("_")[2]) == step]
    if not found:
        known = ", ".join(str(int(file.stem.rpartition("_")[2])) for file in captures)
        wanted = "" if step == FIRST else f" of step {step}"
        raise UserError(f"there is no captured step{wanted} to repeat", folder, f"captured: {known}" if known else "every step of this run was finite")
    return found[0]


def _show(report: dict[str, Any], file: Path) -> None:
    print(f"step {report['step']}: {report['verdict']}")
    if not report["reproduced"]:
        print("  another device, precision, number of threads or version computes otherwise; repeat it where the run ran")
    for name, value in report["losses"].items():
        print(f"  loss {name}: {value} (captured: {report['captured']['losses'].get(name)})")
    print(f"  gradient norm: {report['norm']} (captured: {report['captured']['norm']})")
    print(f"report: {file.with_suffix('.json')}")


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a module's input or output."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _plain(value: float) -> float | str:
    """A number that JSON knows; "nan", "inf" or "-inf" where it is not finite."""
    return value if math.isfinite(value) else str(value)
