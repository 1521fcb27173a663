"""How a model is spread over devices and made fast: DDP, FSDP, activation checkpointing, torch.compile.

All of them treat a model as a sequence of parts (transformer blocks, U-Net stages) and leave its state dict as it is.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn import distributed

PARTS = ("EvaBlock", "SegFormerBlock", "CrossAttentionBlock", "StackedResidualBlocks", "StackedConvBlocks")  # names: importing EvaBlock takes five seconds
SHARDINGS = ("ddp", "fsdp")


def parts(model: nn.Module) -> list[nn.Module]:
    """Transformer blocks and U-Net stages, each once."""
    return [module for module in model.modules() if type(module).__name__ in PARTS]


def speed_up(model: nn.Module, device: torch.device, compiled: bool, recomputed: bool) -> None:
    """Change how the parts of a model compute, not what.

    Args:
        compiled: every part by itself with torch.compile, so that equal ones share their code, and what happens between
            them (taps, views) stays free. Where no compiler works, a warning is printed and nothing is compiled.
        recomputed: keep only the inputs of the trained parts for the backward pass and compute what is inside once more there.
            Random numbers (drop path) repeat exactly. A part with running statistics would update them twice and stays as it is.

    Source: Chen et al. 2016, arXiv:1604.06174 (recomputation).
    """
    if compiled and _can_compile(device):
        torch._dynamo.config.cache_size_limit = 64  # stages of a U-Net x (training, evaluation)
        for part in parts(model):
            part.forward = torch.compile(part.forward)  # type: ignore[method-assign]
    for part in parts(model) if recomputed else []:
        tracks = any(isinstance(module, _NormBase) and module.track_running_stats for module in part.modules())
        if not tracks and any(parameter.requires_grad for parameter in part.parameters()):
            part.forward = partial(checkpoint, part.forward, use_reentrant=False)  # type: ignore[method-assign]


def _can_compile(device: torch.device) -> bool:
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # whatever a compiler, its headers or its cache may lack
        if distributed.rank() == 0:
            print(f"warning: torch.compile does not work here ({' '.join(str(error).split())[:100]}); training without it")
        return False
    return True


def spread(model: nn.Module, sharding: str, device: torch.device) -> nn.Module:
    """The module to call in every one of several processes; gradients are averaged over them.

    In each forward pass of a training all take the buffers of rank 0 (running statistics, queues, centres), so that a
    checkpoint of rank 0 holds everybody's.

    Args:
        model: on the device, with the same weights everywhere.
        sharding: "ddp": every process holds a copy; "fsdp": each parameter, its gradient and its optimiser state are
            divided among them, and a part is put together only while it computes. Needs PyTorch 2.6.

    Raises:
        UserError: unknown sharding; a scalar parameter or an older PyTorch with "fsdp".

    Source: Li et al. 2020, arXiv:2006.15704 (DDP); Zhao et al. 2023, arXiv:2304.11277 (FSDP).
    """
    if sharding not in SHARDINGS:
        raise UserError(f"unknown sharding '{sharding}'", "option -o sharding", f"known: {', '.join(SHARDINGS)}")
    if distributed.ranks() == 1:
        return model
    if sharding == "ddp":
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise UserError(
            f"sharding=fsdp needs PyTorch 2.6, this is {torch.__version__}", "option -o sharding", "update PyTorch, or leave the option out"
        ) from None
    if scalars := [name for name, parameter in model.named_parameters() if parameter.ndim == 0]:
        raise UserError("sharding=fsdp can't divide a parameter without axes", scalars[0], "give it the shape (1,), or leave the option out")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here writes into the output of a part
    mesh = init_device_mesh(device.type, (distributed.ranks(),))
    for module in (*parts(model), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    model.register_forward_pre_hook(_take_buffers)
    return model


@torch.no_grad()
def _take_buffers(model: nn.Module, _: Any) -> None:
    if model.training:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def is_sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


@contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """All parameters of a sharded model whole, so that one rank alone may call any of its methods; all ranks must enter.

    The hooks of FSDP are away meanwhile: they note the order of calls, which must be the same on all ranks.
    """
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
    hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in modules]
    for module in modules:
        module.unshard()
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, (before, after) in zip(modules, hooks):
            module._forward_pre_hooks, module._forward_hooks = before, after
            module.reshard()


def whole(content: Any, seen: dict[int, Tensor] | None = None) -> Any:
    """`content` with every sharded tensor put together, on the CPU of rank 0 (empty on other ranks); all ranks must call it."""
    seen = {} if seen is None else seen
    if hasattr(content, "full_tensor"):
        key = content.to_local().untyped_storage().data_ptr() or id(content)  # aliased weights stay aliased
        if key not in seen:
            full = content.detach().full_tensor()
            seen[key] = full.to("cpu", copy=True) if distributed.rank() == 0 else full.new_empty(0)  # a copy: its storage may be padded
        return seen[key]
    if isinstance(content, dict):
        return {name: whole(value, seen) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(whole(value, seen) for value in content)
    return content


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], strict: bool = True) -> None:
    """Load a whole state dict, or with `strict` off a part of one, divided as the model is."""
    own = model.state_dict()
    model.load_state_dict({name: _divided(value, own.get(name)) for name, value in weights.items()}, strict=strict)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Load whole state dicts of both, divided as the model is."""
    load_weights(model, weights)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {number: {name: _divided(value, parameters[number]) for name, value in values.items()} for number, values in state["state"].items()}
    optimizer.load_state_dict({**state, "state": states})


def _divided(value: Any, like: Any) -> Any:
    if not hasattr(like, "full_tensor") or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None)
