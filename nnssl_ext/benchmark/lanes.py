"""Units of work side by side: in processes of one thread on this machine. Longest chains begin first; what fails stops only what needs it."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process, set_start_method
from multiprocessing.connection import wait as wait_for
from pathlib import Path

import torch

from nnssl_ext.benchmark.units import THREADS, Unit, finish
from nnssl_ext.core.files import write_text

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(THREADS))
GUESSED_S = 60.0  # as if that much work had been done at the pace of the guess


def finish_all(units: Iterable[Unit], out: Path, lanes: int, say: Callable[[str], None] = print) -> list[str]:
    """Finish all units and what they need, `lanes` at a time, each in a process with one thread; a line about each of them.

    Returns:
        what went wrong, a sentence for each unit that failed; the other ones are finished, but for those that need one of them.
    """
    os.environ.update(ONE_THREAD)  # before the processes start: they read it when they load their libraries
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning:torch.jit._script")  # between libraries; nothing a user can mend
    waiting, errors = missing(units, out), list[str]()
    progress = Progress(waiting, lanes)
    while waiting:
        with ProcessPoolExecutor(max(1, lanes), get_context("spawn"), _begin_lane) as pool:
            running: dict[Future[tuple[float, str]], Unit] = {}
            broken = False
            while not broken and (waiting or running):
                for unit in _ready(waiting, running.values())[: max(1, lanes) - len(running)]:
                    waiting.remove(unit)
                    running[pool.submit(_finish, unit, out)] = unit
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    unit = running.pop(done)
                    seconds, error = _outcome(done)
                    broken |= isinstance(done.exception(), BrokenProcessPool)
                    say(progress.line(unit, seconds, error))
                    if error:
                        lost = [other for other in waiting if unit.digest in {needed.digest for needed in _chain(other)}]
                        waiting = [other for other in waiting if other not in lost]
                        progress.leave_out(lost)
                        left_out = f"; not begun, since they need it: {', '.join(other.name for other in lost)}" if lost else ""
                        errors.append(f"{unit.name} failed, {error}{left_out}")
            waiting = [*running.values(), *waiting]  # a process that ends takes the pool with it: what ran beside it begins anew
    return errors


def missing(units: Iterable[Unit], out: Path) -> list[Unit]:
    """Units without a record and what they need, each once; what begins the longest chain comes first."""
    found: dict[str, Unit] = {}
    for unit in units:
        found.update({needed.digest: needed for needed in _chain(unit) if needed.digest not in found and needed.record(out) is None})
    longest = dict.fromkeys(found, 0.0)
    for unit in found.values():
        total = 0.0
        for needed in _chain(unit):
            if needed.digest in longest:
                total += needed.cost
                longest[needed.digest] = max(longest[needed.digest], total)
    return sorted(found.values(), key=lambda unit: -longest[unit.digest])


class Progress:
    """A line for each finished unit, with what the rest will take.

    Args:
        units: all that are to be finished.
        lanes: how many at a time.
    """

    def __init__(self, units: Sequence[Unit], lanes: int) -> None:
        self.count, self.done, self.lanes = len(units), 0, max(1, lanes)
        self.rest = sum(unit.cost for unit in units)
        self.expected = self.spent = GUESSED_S  # so that the first short units don't decide the pace

    def line(self, unit: Unit, seconds: float, error: str) -> str:
        self.done += 1
        self.rest -= unit.cost
        if not error:
            self.expected, self.spent = self.expected + unit.cost, self.spent + seconds
        pace = self.spent / self.expected
        outcome = f"failed, {error}" if error else f"{seconds:.0f} s"
        left = f"; about {max(1, round(self.rest * pace / self.lanes / 60))} min left" if self.done < self.count else ""
        return f"[{self.done}/{self.count}] {unit.name} {outcome}{left}"

    def leave_out(self, units: Sequence[Unit]) -> None:
        self.count -= len(units)
        self.rest -= sum(unit.cost for unit in units)


def estimate(units: Iterable[Unit], out: Path, lanes: int) -> str:
    """What is still to be done, in a sentence."""
    left = missing(units, out)
    minutes = sum(unit.cost for unit in left) / 60
    return f"{len(left)} units, about {minutes:.0f} minutes of one core, {minutes / max(1, lanes):.0f} minutes with {lanes} lane(s)" if left else ""


def _chain(unit: Unit) -> list[Unit]:
    """A unit and what it needs, the last one first."""
    found = [unit]
    while found[-1].needs is not None:
        found.append(found[-1].needs)
    return found


def _ready(waiting: Sequence[Unit], running: Iterable[Unit]) -> list[Unit]:
    blocked = {unit.digest for unit in (*waiting, *running)}
    return [unit for unit in waiting if unit.needs is None or unit.needs.digest not in blocked]


def _begin_lane() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(THREADS)
    set_start_method(None, force=True)  # nnU-Net's pools begin as in its own commands; they would load torch a dozen times


def _end_with_parent() -> None:
    """A lane would wait for work for ever when the process that gives it is killed."""
    parent = parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _finish(unit: Unit, out: Path) -> tuple[float, str]:
    """Seconds of a unit, and what went wrong, else ""; what it and its child processes say goes to UNITS/NAME.txt, where that is anything."""
    said = unit.folder(out).with_suffix(".txt")
    with _said_to(said):
        try:
            return float(finish(unit, out)["seconds"]), ""
        except Exception as error:
            write_text(unit.folder(out) / "error.txt", traceback.format_exc())
            return 0.0, f"{' '.join(str(error).split())[:200]} (see {unit.folder(out) / 'error.txt'})"


@contextmanager
def _said_to(file: Path) -> Iterator[None]:
    """Standard output and error of this process and its children into a file, which is removed where it stays empty."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with open(file, "wb") as taken:
            for number in (1, 2):
                os.dup2(taken.fileno(), number)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, former in zip((1, 2), kept):
            os.dup2(former, number)
            os.close(former)
        if not file.stat().st_size:
            file.unlink()


def _outcome(done: Future[tuple[float, str]]) -> tuple[float, str]:
    try:
        return done.result()
    except BrokenProcessPool:
        return 0.0, "its process was ended from outside, perhaps for want of memory"
