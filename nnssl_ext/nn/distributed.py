"""Several processes, one model: start, ranks, averages."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from nnssl_ext.core.errors import UserError

USER_ERROR = 2  # exit code, as on the command line


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def mean(value: float, device: torch.device) -> float:
    """Average of a number over all ranks."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    dist.all_reduce(total)
    return float(total) / ranks()


def launch(function: Callable[..., Any], processes: int, device: str, *arguments: Any) -> None:
    """Run ``function(*arguments)`` in `processes` processes that form one group (nccl on CUDA, gloo on the CPU)."""
    if processes == 1:
        function(*arguments)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        torch.multiprocessing.spawn(_member, (processes, device, port, function, arguments), nprocs=processes)
    except torch.multiprocessing.ProcessExitedException as error:
        if error.exit_code == USER_ERROR:
            raise SystemExit(USER_ERROR) from None
        raise


def _member(index: int, processes: int, device: str, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if device == "cuda":
        torch.cuda.set_device(index)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=index, world_size=processes)
    try:
        function(*arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(USER_ERROR)  # at once: the other processes may wait for this one
    finally:
        dist.destroy_process_group()
