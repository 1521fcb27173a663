"""Work through many cases in several processes; one bad case never stops the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nnssl_ext.core.errors import DiskError, UserError
from nnssl_ext.preprocessing.memory import MemoryGuard, available_memory

MEMORY_SHARE = 0.9  # of the free memory that the workers may take
PROCESS_BYTES = 300_000_000  # of a worker without any case
PLAIN_EVERY_S = 30.0  # between two lines of progress where the output is no terminal

Numbered = tuple[int, Any]  # an item and its place in the list
Outcomes = Iterator[tuple[int, Any]]  # its result or exception


@dataclass(frozen=True)
class Workers:
    """Who does the work.

    Args:
        processes: worker processes; 1 works in this process.
        dask: None, or the cluster that works instead: "local", "slurm", or a scheduler's address ("tcp://HOST:PORT").
        memory: bytes that the workers may take together; None: what is free.
    """

    processes: int = 1
    dask: str | None = None
    memory: int | None = None


class SomeFailed(Exception):
    """An item stands for several cases, and these of them failed; by name."""

    def __init__(self, errors: dict[str, UserError]) -> None:
        super().__init__(errors)
        self.errors = errors


def run_all(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    names: Sequence[str],
    workers: Workers,
    title: str,
    memory: Callable[[Any], int] = lambda item: 0,
    cases: Sequence[int] | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """``function(item)`` for every item, with a progress bar; failures are listed at the end.

    Args:
        function: importable function of one argument; an exception is a failure of that item alone.
        items: its arguments.
        names: a name per item.
        workers: who does it.
        title: shown at the bar.
        memory: bytes that an item takes at most; no more are started than fit, but always one.
        cases: how many cases each item stands for, counted by the bar; 1 each by default.

    Returns:
        results and failure messages, by name.

    Raises:
        DiskError: the disk is full or failing; nothing further is started.
    """
    results: dict[str, Any] = {}
    failures: dict[str, str] = {}
    cases = [1] * len(items) if cases is None else cases
    total, done = sum(cases), 0
    console = Console()
    if not console.is_terminal:
        _say(console, f"{title}: {total} cases to do")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        start = said = time.monotonic()
        for index, outcome in _outcomes(function, items, workers, memory):
            if isinstance(outcome, DiskError):
                raise outcome
            if isinstance(outcome, Exception):
                errors = outcome.errors if isinstance(outcome, SomeFailed) else {names[index]: outcome}
                for name, error in errors.items():
                    failures[name] = str(error) or type(error).__name__
                    _say(console, f"failed: {name}: {failures[name].splitlines()[0]}")
            else:
                results[names[index]] = outcome
            progress.advance(task, cases[index])
            done, now = done + cases[index], time.monotonic()
            if not console.is_terminal and now - said > PLAIN_EVERY_S:
                said = now
                _say(console, f"{title}: {done} of {total}, about {(now - start) / done * (total - done) / 60:.0f} min left")
    _say(console, f"{title}: {total - len(failures)} of {total} cases done, {len(failures)} failed" + ":" * bool(failures))
    for name, message in sorted(failures.items()):
        _say(console, f"failed: {name}: {message}")
    return results, failures


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _outcomes(function: Callable[[Any], Any], items: Sequence[Any], workers: Workers, memory: Callable[[Any], int]) -> Outcomes:
    if workers.dask is not None:
        from nnssl_ext.preprocessing.dask_workers import outcomes  # an extra; slow to import

        yield from outcomes(partial(_attempt, function), items, workers.processes, workers.dask, memory)
        return
    if workers.processes <= 1 or len(items) <= 1:
        for index, item in enumerate(items):
            yield index, _attempt(function, item)
        return
    waiting = deque(enumerate(items))
    while waiting:
        in_work = yield from _pooled(function, waiting, workers, memory)
        for index, item in in_work:  # when a worker died; one at a time tells whose fault it was
            if (yield from _pooled(function, deque([(index, item)]), Workers(1), memory)):
                yield index, UserError("the worker process died, perhaps for lack of memory", "", "run with fewer processes (-np)")


def _pooled(
    function: Callable[[Any], Any], waiting: deque[Numbered], workers: Workers, memory: Callable[[Any], int]
) -> Generator[tuple[int, Any], None, list[Numbered]]:
    """Take items from `waiting` and yield their outcomes, until all are done or a worker dies; returns the items lost with it."""
    running: dict[Future[Any], Numbered] = {}
    context = multiprocessing.get_context("spawn")
    budget = int(MEMORY_SHARE * available_memory()) if workers.memory is None else workers.memory
    processes = max(1, min(workers.processes, len(waiting), budget // (2 * PROCESS_BYTES)))
    guard = MemoryGuard(budget - processes * PROCESS_BYTES, memory)
    with ProcessPoolExecutor(processes, context, initializer=_live_and_die_with_parent) as pool:
        while waiting or running:
            try:  # one ahead, so that no worker waits for its next item
                while waiting and len(running) <= processes and guard.admits(*waiting[0]):
                    running[pool.submit(_attempt, function, waiting[0][1])] = waiting[0]
                    waiting.popleft()
            except BrokenProcessPool:
                if not running:
                    return [waiting.popleft()]
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            lost = [running.pop(future) for future in list(done) if isinstance(future.exception(), BrokenProcessPool)]
            for future in done & running.keys():
                index = running.pop(future)[0]
                guard.release(index)
                yield index, future.exception() or future.result()
            if lost:
                return sorted([*lost, *running.values()], key=lambda numbered: numbered[0])
    return []


def _live_and_die_with_parent() -> None:
    """Ctrl-C is the parent's to answer: it lets the present cases finish. When the parent is killed, its workers must not stay behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _attempt(function: Callable[[Any], Any], item: Any) -> Any:
    """The result or, so that the other items go on, the exception."""
    try:
        return function(item)
    except (UserError, SomeFailed) as error:
        return error
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return UserError(f"unexpected {type(error).__name__}: {error}", f"{frame.filename}, line {frame.lineno}", "report it with this message")
