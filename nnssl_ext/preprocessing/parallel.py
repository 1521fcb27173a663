"""Work through many cases in several processes; one bad case never stops the others."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nnssl_ext.core.errors import DiskError, UserError


def run_all(function: Callable[[Any], Any], items: Sequence[Any], names: Sequence[str], processes: int, title: str) -> tuple[dict[str, Any], dict[str, str]]:
    """``function(item)`` for every item, with a progress bar.

    Args:
        function: importable function of one argument; a `UserError` it raises is a failure of that item alone.
        items: its arguments.
        names: a name per item.
        processes: worker processes; 1 works in this process.
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
        for index, outcome in _outcomes(function, items, processes):
            progress.advance(task)
            if isinstance(outcome, DiskError):
                raise outcome
            if isinstance(outcome, Exception):
                failures[names[index]] = str(outcome) if isinstance(outcome, UserError) else f"{type(outcome).__name__}: {outcome}"
                console.print(f"failed: {names[index]}: {failures[names[index]]}", highlight=False, soft_wrap=True, markup=False)
            else:
                results[names[index]] = outcome
    console.print(f"{title}: {len(results)} of {len(items)} cases done, {len(failures)} failed", highlight=False)
    return results, failures


def _outcomes(function: Callable[[Any], Any], items: Sequence[Any], processes: int) -> Iterator[tuple[int, Any]]:
    if processes <= 1 or len(items) <= 1:
        for index, item in enumerate(items):
            yield index, _attempt(function, item)
        return
    left = set(range(len(items)))
    with _pool(min(processes, len(items))) as pool:
        futures = {pool.submit(_attempt, function, items[index]): index for index in left}
        try:
            for future in as_completed(futures):
                if not isinstance(future.exception(), BrokenProcessPool):
                    left.remove(futures[future])
                    yield futures[future], future.result()
        except GeneratorExit:  # the caller gave up, as on a full disk
            pool.shutdown(cancel_futures=True)
            raise
    for index in sorted(left):  # a worker died and took the pool along: one at a time tells which case it was
        with _pool(1) as pool:
            try:
                outcome = pool.submit(_attempt, function, items[index]).result()
            except BrokenProcessPool:
                outcome = UserError("the worker process died, perhaps for lack of memory", "", "run with fewer processes (-np)")
        yield index, outcome


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))


def _attempt(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except Exception as error:  # handed back, so that the other cases go on
        return error
