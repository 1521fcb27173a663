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
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nnssl_ext.core.errors import DiskError, UserError

PLAIN_EVERY_S = 30.0  # between two lines of progress where the output is no terminal

Numbered = tuple[int, Any]  # an item and its place in the list
Outcomes = Iterator[tuple[int, Any]]  # its result or exception


@dataclass(frozen=True)
class Workers:
    """Who does the work.

    Args:
        processes: worker processes; 1 works in this process.
    """

    processes: int = 1


def run_all(function: Callable[[Any], Any], items: Sequence[Any], names: Sequence[str], workers: Workers, title: str) -> tuple[dict[str, Any], dict[str, str]]:
    """``function(item)`` for every item, with a progress bar; failures are listed at the end.

    Args:
        function: importable function of one argument; an exception is a failure of that item alone.
        items: its arguments.
        names: a name per item.
        workers: who does it.
        title: shown at the bar.

    Returns:
        results and failure messages, by name.

    Raises:
        DiskError: the disk is full or failing; nothing further is started.
    """
    results: dict[str, Any] = {}
    failures: dict[str, str] = {}
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=len(items))
        start = said = time.monotonic()
        for index, outcome in _outcomes(function, items, workers.processes):
            if isinstance(outcome, DiskError):
                raise outcome
            if isinstance(outcome, Exception):
                failures[names[index]] = str(outcome) or type(outcome).__name__
                _say(console, f"failed: {names[index]}: {failures[names[index]].splitlines()[0]}")
            else:
                results[names[index]] = outcome
            progress.advance(task)
            done, now = len(results) + len(failures), time.monotonic()
            if not console.is_terminal and now - said > PLAIN_EVERY_S:
                said = now
                _say(console, f"{title}: {done} of {len(items)}, about {(now - start) / done * (len(items) - done) / 60:.0f} min left")
    _say(console, f"{title}: {len(results)} of {len(items)} cases done, {len(failures)} failed" + ":" * bool(failures))
    for name, message in sorted(failures.items()):
        _say(console, f"failed: {name}: {message}")
    return results, failures


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _outcomes(function: Callable[[Any], Any], items: Sequence[Any], processes: int) -> Outcomes:
    if processes <= 1 or len(items) <= 1:
        for index, item in enumerate(items):
            yield index, _attempt(function, item)
        return
    waiting = deque(enumerate(items))
    while waiting:
        in_work = yield from _pooled(function, waiting, processes)
        for index, item in in_work:  # when a worker died; one at a time tells whose fault it was
            if (yield from _pooled(function, deque([(index, item)]), 1)):
                yield index, UserError("the worker process died, perhaps for lack of memory", "", "run with fewer processes (-np)")


def _pooled(function: Callable[[Any], Any], waiting: deque[Numbered], processes: int) -> Generator[tuple[int, Any], None, list[Numbered]]:
    """Take items from `waiting` and yield their outcomes, until all are done or a worker dies; returns the items lost with it."""
    running: dict[Future[Any], Numbered] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(waiting)), context, initializer=_live_and_die_with_parent) as pool:
        while waiting or running:
            try:
                while waiting and len(running) <= processes:  # one ahead, so that no worker waits for its next item
                    running[pool.submit(_attempt, function, waiting[0][1])] = waiting[0]
                    waiting.popleft()
            except BrokenProcessPool:
                if not running:
                    return [waiting.popleft()]
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            lost = [running.pop(future) for future in list(done) if isinstance(future.exception(), BrokenProcessPool)]
            for future in done & running.keys():
                yield running.pop(future)[0], future.exception() or future.result()
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
    except UserError as error:
        return error
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return UserError(f"unexpected {type(error).__name__}: {error}", f"{frame.filename}, line {frame.lineno}", "report it with this message")
