"""Several processes, one model: start, ranks, averages."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

GRACE_S = 20.0  # for the other processes when one has failed


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


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """Each number's largest value over all ranks."""
    if not dist.is_initialized():
        return list(values)
    found = torch.tensor(values, dtype=torch.float32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [float(value) for value in found]


def stacked(tensor: Tensor) -> Tensor:
    """The tensors of all ranks, of equal shape, along a new first axis; without gradient."""
    if not dist.is_initialized():
        return tensor.detach()[None]
    found = tensor.new_empty(ranks(), *tensor.shape)
    dist.all_gather(list(found.unbind()), tensor.detach().contiguous())
    return found


def joined(x: Tensor) -> Tensor:
    """The rows of all ranks, of which each may have another number, one below the other; only this rank's have a gradient."""
    if not dist.is_initialized():
        return x
    counts = [int(count) for count in stacked(torch.tensor([len(x)], device=x.device))]
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x.detach()
    return torch.cat([x if number == rank() else part[:count] for number, (part, count) in enumerate(zip(stacked(padded), counts))])


def summed(x: Tensor) -> Tensor:
    """Sum over all ranks, element by element; its gradient is that of all ranks' losses together."""
    return _Sum.apply(x) if dist.is_initialized() else x  # type: ignore[no-any-return]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient.contiguous())


def own_share(loss: Tensor) -> Tensor:
    """A loss that every rank computes over everybody's `joined` rows, with a gradient whose average over the ranks is that of one process.

    A rank knows the gradient by its own rows alone; averaging divides it by the number of ranks.
    """
    return ranks() * loss - (ranks() - 1) * loss.detach()


def local(tensor: Any) -> Tensor:
    """This process's share of a sharded tensor, with the same memory; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


@contextmanager
def group(device: str) -> Iterator[None]:
    """Join the processes that torchrun, SLURM or `launch` started together, if any (nccl on CUDA, gloo on the CPU)."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or dist.is_initialized():
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End a process of a group: run what was registered with atexit, flush the output, and leave out the teardown of the interpreter.

    `DistributedDataParallel` keeps gloo's threads alive after their group; one that lets go of a tensor while the interpreter is
    torn down ends the process with SIGABRT ("terminate called without an active exception"), after all work was done.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch(command: Sequence[str], processes: int) -> int:
    """Run a command in `processes` processes of one group on this machine, told apart as torchrun does (RANK, WORLD_SIZE, ...).

    SIGTERM, SIGUSR1, SIGUSR2 and SIGINT are passed on. When one process fails, the others are ended.

    Returns:
        0, or the exit code that tells most about what failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))}
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: object) -> None:
        for process in started:
            process.send_signal(number)

    former = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)}
    try:
        for rank_ in range(processes):
            own = {"RANK": str(rank_), "LOCAL_RANK": str(rank_), "NNSSL_LAUNCHER": str(os.getpid())}
            started.append(subprocess.Popen(list(command), env={**os.environ, **shared, **own}))
        while None in [process.poll() for process in started] and not any(process.returncode for process in started):
            time.sleep(0.1)
        first = next((process.returncode for process in started if process.returncode), 0)
        _end(started)
        # 1: it lost its connection to one that ended before; -9: ended by us
        telling = next((process.returncode for process in started if process.returncode not in (0, 1, -signal.SIGKILL)), first)
        return telling if telling >= 0 else 128 - telling
    finally:
        _end(started)
        for number, handler in former.items():
            signal.signal(number, handler)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End what still runs: all ranks react to a stop together, so that the others get a while to end by themselves."""
    end = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def end_with_launcher() -> None:
    """In a process that `launch` or torchrun started: when that one is gone, stop as on SIGTERM, and end in any case after a while."""
    launcher = os.environ.get("NNSSL_LAUNCHER") or (os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None)
    if launcher:
        threading.Thread(target=_watch, args=(int(launcher),), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)
