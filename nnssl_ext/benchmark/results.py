"""results.json: one run for each thing that was measured, from the records of the units; and its comparison with an expected one."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnssl_ext import __version__
from nnssl_ext.benchmark.grid import Planned
from nnssl_ext.benchmark.suite import Suite
from nnssl_ext.benchmark.units import RECORD, environment
from nnssl_ext.core.files import read_json, sha256_json, write_json
from nnssl_ext.evaluation.cost import COSTS

RESULTS = "results.json"
KEYS = ("kind", "method", "family", "role", "dataset", "mode", "labels", "pretrain_seed", "seed")  # what tells runs apart
EMPTY: Mapping[str, Any] = {"cases": {}, "figures": {}, "curves": {}, "alarms": [], "pictures": {}}
Row = dict[str, Any]


def write_results(planned: Sequence[Planned], suite: Suite, out: Path, command: str) -> Row:
    """Write OUT/results.json from all units that are finished; its content."""
    content = {
        "version": __version__,
        "command": command,
        "suite": suite.as_dict(),
        "environment": {**environment(), "machine": platform.machine(), "processor": processor(), "python": platform.python_version()},
        "digest": sha256_json([suite.digest, [one.unit.digest for one in planned]]),
        "runs": [run for one in planned for run in runs_of(one, out)],
    }
    write_json(out / RESULTS, content)
    return content


def runs_of(planned: Planned, out: Path) -> list[Row]:
    """What the record of a unit says, under the names of the results; nothing where there is no record."""
    record = planned.unit.record(out)
    if planned.run is None or record is None:
        return []
    folder = planned.unit.folder(out).relative_to(out)
    times = {"seconds": record["seconds"], "cpu_seconds": record["cpu_seconds"], "record": str(folder / RECORD)}
    return [
        {**EMPTY, **planned.run, **times, **found, "pictures": {caption: str(folder / file) for caption, file in found.get("pictures", {}).items()}}
        for found in record["result"]["runs"]
    ]


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.processor())
    except OSError:
        return platform.processor()


def expected(results: Mapping[str, Any]) -> Row:
    """What of a results.json another machine can be expected to find: no times and memory, which are never the same twice, no paths."""
    runs = {_name(run): {"cases": _untimed(run["cases"]), "figures": _untimed(run["figures"])} for run in results["runs"]}
    return {"digest": results["digest"], "suite": sha256_json(results["suite"]), "environment": results["environment"], "runs": runs}


def differences(results: Mapping[str, Any], file: Path) -> tuple[list[str], bool]:
    """What differs from an expected file, a line each, and whether it may: on another machine, or with other versions.

    Raises:
        UserError: the file can't be read.
    """
    wanted, found = read_json(file), expected(results)
    lines = [f"another suite: {wanted['suite'][:12]} was expected, not {found['suite'][:12]}"] * (wanted["suite"] != found["suite"])
    here, there = (dict(_numbers(one["environment"])) for one in (found, wanted))
    other = [f"{key}: {there.get(key)} was expected, not {here.get(key)}" for key in sorted({*here, *there}) if here.get(key) != there.get(key)]
    missing = [f"missing: {name}" for name in wanted["runs"] if name not in found["runs"]]
    more = [f"not expected: {name}" for name in found["runs"] if name not in wanted["runs"]]
    numbers = [line for name, run in found["runs"].items() if name in wanted["runs"] for line in _unlike(name, run, wanted["runs"][name])]
    return lines + other + missing + more + numbers, bool(other)


def _name(run: Mapping[str, Any]) -> str:
    return ", ".join("-" if run[key] is None else str(run[key]) for key in KEYS)


def _untimed(content: Any) -> Any:
    return {key: _untimed(value) for key, value in content.items() if key not in COSTS} if isinstance(content, dict) else content


def _unlike(name: str, ours: Any, wanted: Any) -> list[str]:
    """One line for a run, with the largest difference."""
    one, other = dict(_numbers(ours)), dict(_numbers(wanted))
    keys = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
    apart = {key: abs(one[key] - other[key]) for key in keys if isinstance(one.get(key), (int, float)) and isinstance(other.get(key), (int, float))}
    if not keys:
        return []
    worst = max(apart, key=lambda key: apart[key]) if apart else keys[0]
    return [f"{name}: {len(keys)} of {len(one)} numbers differ, most {worst}: {other.get(worst)} was expected, not {one.get(worst)}"]


def _numbers(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested dictionary by their paths."""
    if not isinstance(content, dict):
        yield path, content
        return
    for key, value in content.items():
        yield from _numbers(value, f"{path}/{key}" if path else str(key))
