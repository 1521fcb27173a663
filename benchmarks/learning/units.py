"""Units of work with a record each: what is finished is never computed again, in this or a later run.

A unit is a function and its settings. Its folder is named by a hash of everything that it depends on, and holds what the function
writes and prints (log.txt); record.json, written last, marks it finished. A unit that was interrupted begins anew.
"""

from __future__ import annotations

import os
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Any

import torch

from nnssl_ext.core.files import read_json, sha256_json, write_json, write_text

THREADS = 1  # of each unit
RECORD = "record.json"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(THREADS))
Work = Callable[[dict[str, Any], Path, Path | None], dict[str, Any]]


@dataclass(frozen=True)
class Unit:
    """One piece of work.

    Args:
        name: begins the name of its folder.
        work: function of a module; called with `settings`, the unit's own folder and the folder of the unit that it needs, it returns
            its result in JSON types.
        settings: all that the result depends on beside the versions of the packages and the number of threads, in JSON types.
        needs: the unit that must be finished before.
    """

    name: str
    work: Work
    settings: dict[str, Any]
    needs: Unit | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the result depends on."""
        before = None if self.needs is None else self.needs.digest
        return {"work": f"{self.work.__module__}.{self.work.__qualname__}", "settings": self.settings, "needs": before, **environment()}

    @property
    def digest(self) -> str:
        return sha256_json(self.identity)[:12]

    def folder(self, out: Path) -> Path:
        return out / "units" / f"{self.name}_{self.digest}"

    def record(self, out: Path) -> dict[str, Any] | None:
        """ "identity", "result" and "seconds" of a finished unit; None before that."""
        file = self.folder(out) / RECORD
        return read_json(file) if file.is_file() else None


def environment() -> dict[str, Any]:
    """Versions of the packages that compute, and the number of threads."""
    return {"versions": {name: version(name) for name in ("nnssl_ext", "torch", "nnunetv2", "dynamic-network-architectures")}, "threads": THREADS}


def finish(unit: Unit, out: Path) -> dict[str, Any]:
    """The record of a unit, which is computed where it is missing (the one that it needs, too)."""
    known = unit.record(out)
    if known is not None:
        return known
    given = None
    if unit.needs is not None:
        finish(unit.needs, out)
        given = unit.needs.folder(out)
    folder = unit.folder(out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic(), time.process_time()
    with open(folder / "log.txt", "w", encoding="utf-8") as log, redirect_stdout(log):
        result = unit.work(unit.settings, folder, given)
    seconds, cpu = time.monotonic() - began[0], time.process_time() - began[1]
    record = {"name": unit.name, "identity": unit.identity, "result": result, "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}
    write_json(folder / RECORD, record)
    return record


def finish_all(chains: Sequence[Sequence[Unit]], out: Path, lanes: int, say: Callable[[str], None] = print) -> list[str]:
    """Finish all units, `lanes` chains at a time, each in a process with one thread; the units of a chain one after the other.

    Returns:
        what went wrong, a sentence for each chain that was given up; the other ones are finished.
    """
    os.environ.update(ONE_THREAD)  # before the processes start: they read it when they load their libraries
    missing = [chain for chain in chains if any(unit.record(out) is None for unit in chain)]
    errors = []
    with ProcessPoolExecutor(max(1, lanes), get_context("spawn"), _begin_lane) as pool:
        for done in as_completed([pool.submit(_finish_chain, chain, out) for chain in missing]):
            text, failed = done.result()
            say(text)
            errors += [text] * failed
    return errors


def _begin_lane() -> None:
    torch.set_num_threads(THREADS)
    set_start_method(None, force=True)  # nnU-Net's pools begin as in its own commands; they would load torch a dozen times


def _finish_chain(chain: Sequence[Unit], out: Path) -> tuple[str, bool]:
    """What to say about a chain, and whether it was given up."""
    done = []
    for unit in chain:
        try:
            record = finish(unit, out)
        except Exception as error:
            write_text(unit.folder(out) / "error.txt", traceback.format_exc())
            return f"{unit.name} failed, {' '.join(str(error).split())[:200]} (see {unit.folder(out) / 'error.txt'})", True
        done.append(f"{unit.name} {record['seconds']:.0f} s")
    return ", ".join(done), False
