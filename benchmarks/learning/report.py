"""The table of a study, from its records."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.learning.study import Baseline, Trial
from nnssl_ext.benchmark.units import Unit

HEAD = (
    "method",
    "backbone",
    "steps",
    "pretraining, CPU-s",
    "k-NN Dice",
    "gain over random weights",
    "Dice, fine-tuned",
    "gain over scratch",
    "fine-tuning, CPU-s",
)


def rows(baselines: Sequence[Baseline], trials: Sequence[Trial], out: Path) -> list[dict[str, Any]]:
    """One row for each baseline and method, with the value of each seed; a seed counts where all that its row needs is finished."""
    found = []
    for base in baselines:
        random, scratch = _records(base.untrained, out), _records(base.scratch, out)
        raw = base.intensities.record(out)
        if raw is not None:
            found.append({"method": "raw intensities", "family": base.family, "knn": {"all": raw["result"]["knn_dice"]}})
        row = {"method": "random weights", "family": base.family, "knn": _values(random, "knn_dice"), "dice": _values(scratch, "dice")}
        found.append(row | {"cases": _values(scratch, "cases"), "finetune_seconds": _seconds(scratch)})
        for trial in (trial for trial in trials if trial.entry.family == base.family):
            trained, probed, tuned = (_records(units, out) for units in (trial.pretrained, trial.probed, trial.finetuned))
            row = {"method": trial.entry.method, "family": base.family, "entry": trial.entry.as_dict(), "alarms": _values(trained, "alarms")}
            row |= {"steps": next(iter(_values(trained, "steps").values()), None), "pretrain_seconds": _seconds(trained)}
            row |= {"knn": _values(probed, "knn_dice"), "knn_gain": _gain(probed, random, "knn_dice")}
            row |= {"dice": _values(tuned, "dice"), "dice_gain": _gain(tuned, scratch, "dice")}
            found.append(row | {"cases": _values(tuned, "cases"), "finetune_seconds": _seconds(tuned)})
    return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: mean, and the value of each seed in brackets."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for row in found:
        seconds = [_mean(row.get(key, {}), "{:.0f}") for key in ("pretrain_seconds", "finetune_seconds")]
        knn, knn_gain, dice, dice_gain = (
            _cell(row.get(key, {}), signed) for key, signed in (("knn", False), ("knn_gain", True), ("dice", False), ("dice_gain", True))
        )
        steps = str(row.get("steps") or "-")
        lines.append(f"| {' | '.join((row['method'], row['family'], steps, seconds[0], knn, knn_gain, dice, dice_gain, seconds[1]))} |")
    return "\n".join(lines) + "\n"


def _records(units: Mapping[int, Unit], out: Path) -> dict[str, dict[str, Any]]:
    found = {str(seed): unit.record(out) for seed, unit in units.items()}
    return {seed: record for seed, record in found.items() if record is not None}


def _values(records: Mapping[str, dict[str, Any]], key: str) -> dict[str, Any]:
    return {seed: record["result"][key] for seed, record in records.items()}


def _seconds(records: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    return {seed: record["cpu_seconds"] for seed, record in records.items()}


def _gain(ours: Mapping[str, dict[str, Any]], base: Mapping[str, dict[str, Any]], key: str) -> dict[str, float]:
    """Differences of the seeds that both have."""
    return {seed: record["result"][key] - base[seed]["result"][key] for seed, record in ours.items() if seed in base}


def _cell(values: Mapping[str, float], signed: bool) -> str:
    form = "{:+.3f}" if signed else "{:.3f}"
    each = ", ".join(form.format(value) for value in values.values())
    return f"{_mean(values, form)} ({each})" if len(values) > 1 else _mean(values, form)


def _mean(values: Mapping[str, float], form: str) -> str:
    return form.format(statistics.fmean(values.values())) if values else "-"
