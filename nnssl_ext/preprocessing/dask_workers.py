"""Work through many cases on a Dask cluster: on this machine, under SLURM, or wherever a scheduler listens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

from threadpoolctl import threadpool_limits

from nnssl_ext.core.errors import UserError
from nnssl_ext.preprocessing.memory import MemoryGuard, available_memory

try:
    import distributed
except ImportError:
    distributed: Any = None  # type: ignore[no-redef]

CONNECT_S = 30  # how long to look for a scheduler
WORKERLESS_S = 300  # how long to wait for workers where all are gone; jobs of SLURM may wait in its queue for as long as they like
POLL_S, ASK_S = 0.02, 5  # how often to look for results, for workers
JOB_MEMORY = "16GB"  # of a SLURM job of one core, where Dask's configuration names none


def outcomes(function: Callable[[Any], Any], items: Sequence[Any], processes: int, cluster: str, memory: Callable[[Any], int]) -> Iterator[tuple[int, Any]]:
    """Results of ``function(item)`` as they come, with the item's number.

    A case whose worker dies is tried again on another one (Dask's `allowed-failures`, 3 times), then fails alone.

    Args:
        function: importable on the workers.
        items: its arguments.
        processes: workers to start, where they are started here.
        cluster: "local", "slurm", or a scheduler's address.
        memory: bytes that an item takes at most.

    Raises:
        UserError: Dask isn't installed, the cluster can't be reached, or all its workers are gone.
    """
    if distributed is None:
        raise UserError("Dask is not installed", "option --dask-scheduler", "pip install 'nnssl_ext[dask]'")
    waiting = deque(enumerate(items))
    running: dict[Any, int] = {}
    suspects: list[int] = []  # were on workers that died
    with ExitStack() as stack:
        client = _connect(cluster, processes, stack)
        guard = MemoryGuard(_budget(client), memory)
        finished = distributed.as_completed()
        while waiting or running:
            width = 2 * max(1, sum(client.nthreads().values()))  # workers may come and go
            while waiting and len(running) < width and guard.admits(*waiting[0]):
                index, item = waiting.popleft()
                future = client.submit(_alone, function, item, pure=False)
                running[future] = index
                finished.add(future)
            _wait(finished.has_ready, client, cluster)
            future = next(finished)
            index = running.pop(future)
            guard.release(index)
            outcome = _outcome(future, client, cluster)
            if isinstance(outcome, distributed.scheduler.KilledWorker):
                suspects.append(index)
            else:
                yield index, outcome
        for index in sorted(suspects):  # one at a time tells whose fault it was
            outcome = _outcome(client.submit(_alone, function, items[index], pure=False), client, cluster)
            if isinstance(outcome, distributed.scheduler.KilledWorker):
                outcome = UserError("the workers that tried it died, perhaps for lack of memory", "", "give the workers more memory")
            yield index, outcome


def _outcome(future: Any, client: Any, cluster: str) -> Any:
    """Its result or an error of its own; KilledWorker where workers died of it, or of another one while they held its result."""
    while True:
        _wait(future.done, client, cluster)
        try:
            return future.result(timeout=ASK_S)
        except distributed.scheduler.KilledWorker as error:
            return error
        except Exception as error:
            if isinstance(error, TimeoutError) and future.status != "error":
                continue  # lost with its worker, and computed again
            return UserError(f"the worker could not take the case: {type(error).__name__}: {error}", "", "install the same nnssl_ext on all workers")


def _wait(ready: Callable[[], bool], client: Any, cluster: str) -> None:
    """Until it is ready; not for ever where nobody is left to work (Dask's nanny gives a worker up that dies while it starts)."""
    asked = seen = time.monotonic()
    while not ready():
        time.sleep(POLL_S)
        now = time.monotonic()
        if now - asked > ASK_S:
            asked = now
            if cluster == "slurm" or client.nthreads():
                seen = now
            elif now - seen > WORKERLESS_S:
                again = "give the same command again, finished cases are kept"
                fix = again if cluster == "local" else f"start workers (dask worker {cluster}) and {again}"
                raise UserError(f"no worker is left, for {WORKERLESS_S} s now", f"--dask-scheduler {cluster}", fix)


def _connect(cluster: str, processes: int, stack: ExitStack) -> Any:
    try:
        if cluster == "local":
            started = distributed.LocalCluster(n_workers=processes, threads_per_worker=1, memory_limit=0, dashboard_address=None)
            return stack.enter_context(distributed.Client(stack.enter_context(started)))
        if cluster == "slurm":
            started = stack.enter_context(slurm_cluster())
            started.scale(processes)
            return stack.enter_context(distributed.Client(started))
        return stack.enter_context(distributed.Client(cluster, timeout=CONNECT_S))
    except (OSError, ValueError, TimeoutError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"no Dask cluster: {reason}", f"--dask-scheduler {cluster}", "give the address of a running scheduler (tcp://HOST:PORT), local or slurm"
        ) from error


def slurm_cluster() -> Any:
    """A cluster whose workers are SLURM jobs of one core each; queue, account and memory come from Dask's configuration (jobqueue.yaml).

    Raises:
        UserError: dask-jobqueue isn't installed.
    """
    try:
        import dask
        import dask_jobqueue
    except ImportError:
        raise UserError("dask-jobqueue is not installed", "--dask-scheduler slurm", "pip install 'nnssl_ext[dask]'") from None
    configured = dask.config.get("jobqueue.slurm", {})
    return dask_jobqueue.SLURMCluster(
        cores=configured.get("cores") or 1, processes=configured.get("processes") or 1, memory=configured.get("memory") or JOB_MEMORY
    )


def _budget(client: Any) -> int:
    """Bytes that the workers have together; where they know no limit, what is free here."""
    limits = client.run_on_scheduler(_limits)
    return sum(limits) if limits and all(limits) else available_memory()


def _limits(dask_scheduler: Any) -> list[int]:
    return [int(worker.memory_limit or 0) for worker in dask_scheduler.workers.values()]


def _alone(function: Callable[[Any], Any], item: Any) -> Any:
    """On the worker. One BLAS thread for as long as the process lives: several cases may share it, and the last bits depend on the threads."""
    _one_blas_thread()
    return function(item)


@lru_cache(maxsize=1)
def _one_blas_thread() -> Any:
    return threadpool_limits(1, "blas")
