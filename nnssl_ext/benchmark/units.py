"""Units of work with a record each: what is finished is never computed again, in this or a later run.

A unit is a function and its settings. Its folder is named by a hash of everything that it depends on, and holds what the function
writes and prints (log.txt); record.json, written last, marks it finished. A unit that was interrupted begins anew.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnssl_ext.core.files import read_json, sha256_json, write_json

THREADS = 1  # of each unit
RECORD, LATEST = "record.json", "checkpoint_latest.pth"
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
        cost: seconds that it may take, about: longer chains begin earlier.
        goes_on: `work` continues from the checkpoint_latest.pth that an interruption left.
    """

    name: str
    work: Work
    settings: dict[str, Any]
    needs: Unit | None = None
    cost: float = field(default=60.0, compare=False)
    goes_on: bool = field(default=False, compare=False)

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
    if not (unit.goes_on and (folder / LATEST).is_file()):
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic(), time.process_time()
    with open(folder / "log.txt", "w", encoding="utf-8") as log, redirect_stdout(log):
        result = unit.work(unit.settings, folder, given)
    seconds, cpu = time.monotonic() - began[0], time.process_time() - began[1]
    record = {"name": unit.name, "identity": unit.identity, "result": result, "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}
    write_json(folder / RECORD, record)
    return record
