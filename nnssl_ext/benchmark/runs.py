"""The runs of a benchmark as its results file names them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import read_json

KINDS = ("pretrain", "segmentation", "probe", "classification", "registration")
ROLES = ("baseline", "method", "negative control", "upper bound")
MODES = ("full", "encoder", "frozen", "adapter", "mlp", "linear")

Seeds = tuple[int | None, int | None]  # of the pretraining, of what came after


@dataclass(frozen=True)
class Run:
    """One training or evaluation.

    Args:
        labels: labelled cases it learned from.
        cases: figures of each test case (or pair) by name, "labels" among them holds those of each label.
        figures: figures of the run as a whole; an estimate is {"mean", "low", "high", "count"}.
        curves: [step, value] of each curve.
        record: file with all of this, relative to the results.
        error: why there is no result; "" where there is one.
    """

    kind: str
    method: str
    role: str = "method"
    family: str | None = None
    dataset: str | None = None
    mode: str | None = None
    labels: int | None = None
    pretrain_seed: int | None = None
    seed: int | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    cases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    alarms: Sequence[str] = ()
    record: str | None = None
    pictures: Mapping[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def seeds(self) -> Seeds:
        return self.pretrain_seed, self.seed

    def setting(self) -> tuple[str, ...]:
        """What is compared with what: dataset, family, mode, labelled cases; for sorting, small numbers first."""
        mode = MODES.index(self.mode) if self.mode in MODES else -1
        return self.dataset or "", self.family or "", f"{mode:+d}{self.mode or ''}", f"{-1 if self.labels is None else self.labels:09d}"

    def of_cases(self, name: str, label: str | None = None) -> dict[str, float]:
        """One figure of each case that has it (NaN where it could not be computed), of all labels or of one."""
        found = {case: values if label is None else (values.get("labels") or {}).get(label) or {} for case, values in self.cases.items()}
        return {case: number(values[name]) for case, values in found.items() if name in values}


@dataclass(frozen=True)
class Results:
    """A results file; `runs` in the order of their settings, so that the order of the file doesn't matter."""

    version: str
    command: str
    digest: str
    suite: Mapping[str, Any]
    environment: Mapping[str, Any]
    runs: Sequence[Run]

    def done(self, kind: str) -> list[Run]:
        return [run for run in self.runs if run.kind == kind and not run.error]


def read_results(path: Path) -> Results:
    """Read a results file.

    Raises:
        UserError: it is no results file.
    """
    content, known = read_json(path), {one.name for one in fields(Run)}
    fix = "run nnssl_benchmark again: finished parts are taken from its cache"
    if not isinstance(content, dict) or not isinstance(content.get("runs"), list):
        raise UserError("the file holds no results of a benchmark", path, fix)
    runs = []
    for number_, entry in enumerate(content["runs"]):
        if (
            not isinstance(entry, dict)
            or entry.get("kind") not in KINDS
            or not isinstance(entry.get("method"), str)
            or entry.get("role", "method") not in ROLES
        ):
            raise UserError(f"run {number_} needs a kind, a method and a role that are known", path, fix)
        runs.append(Run(**{key: value for key, value in entry.items() if key in known and value is not None}))
    head = {key: content.get(key) or "" for key in ("version", "command", "digest")}
    return Results(**head, suite=content.get("suite") or {}, environment=content.get("environment") or {}, runs=sorted(runs, key=_order))


def names(runs: Iterable[Run]) -> list[str]:
    """Figures that the cases of any of the runs have, in the order in which they come."""
    return list(dict.fromkeys(key for run in runs for table in run.cases.values() for key in table if key != "labels"))


def label_names(runs: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(label for run in runs for table in run.cases.values() for label in table.get("labels") or {}))


def number(value: Any) -> float:
    """NaN for null."""
    return math.nan if value is None else float(value)


def _order(run: Run) -> tuple[Any, ...]:
    seeds = tuple(-1 if seed is None else seed for seed in run.seeds)
    return KINDS.index(run.kind), run.setting(), ROLES.index(run.role), run.method, seeds, run.record or ""
