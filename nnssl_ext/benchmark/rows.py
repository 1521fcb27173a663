"""Rows of a benchmark's tables: all seeds of a method in one setting, beside the reference of their kind.

A figure is the mean over cases of the mean over seeds, its interval draws cases. Differences are paired by case, and by seed where the reference has
the same one. Figures that a run has without cases are averaged over seeds, and so are the ends of their intervals.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from nnssl_ext.benchmark.runs import Run, label_names, names, number
from nnssl_ext.evaluation.statistics import Estimate, bootstrap_mean, mean_of_seeds, over_seeds, paired_difference, relative_gain

REFERENCES = {"segmentation": "scratch", "probe": "random weights", "classification": "random weights", "registration": "MIND"}
NEGLIGIBLE = 0.02  # Dice: a negative control may gain less, whatever its interval

Row = dict[str, Any]
Pairs = Sequence[tuple[Run, Sequence[Run]]]  # a run and those of the reference that it is compared with


def rows_of(kind: str, runs: Sequence[Run]) -> list[Row]:
    """A row for every method and setting, in the order of the settings."""
    grouped: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in runs:
        grouped[run.setting() + (run.role, run.method)].append(run)
    rows = [_row(kind, own, _reference(kind, own[0], list(grouped.values()))) for own in grouped.values()]
    return [{"id": f"{kind}-{place}", **row} for place, row in enumerate(rows, 1)]


def about(runs: Sequence[Run]) -> Row:
    """What runs have in common, their seeds and their record files."""
    first = runs[0]
    common = {key: getattr(first, key) for key in ("method", "role", "dataset", "family", "mode", "labels")}
    return {**common, "seeds": [list(run.seeds) for run in runs], "sources": sources(runs)}


def sources(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.record for run in runs if run.record))


def passes(gain: Mapping[str, float | None]) -> bool:
    """Whether a negative control gains nothing: the interval contains 0, or the gain is negligible."""
    mean, low, high = (gain[key] for key in ("mean", "low", "high"))
    return (low is not None and high is not None and low <= 0 <= high) or (mean is not None and abs(mean) < NEGLIGIBLE)


def _row(kind: str, runs: Sequence[Run], base: Sequence[Run]) -> Row:
    pairs = _pairs(runs, base, strict=kind == "segmentation")
    figures = dict.fromkeys([*names(runs), *(name for run in runs for name in run.figures)])
    row: Row = {**about(runs), "cases": len({case for run in runs for case in run.cases}), "metrics": {name: _metric(name, runs, pairs) for name in figures}}
    if pairs:
        compared = list({id(other): other for _, partners in pairs for other in partners}.values())
        row["reference"] = {key: about(compared)[key] for key in ("method", "mode", "sources")}
    if labels := label_names(runs):
        row["dice_per_label"] = {label: _mean(runs, "dice", label).as_dict() for label in labels}
    alike = "reference" in row and (row["reference"]["mode"] or "full") == (row["mode"] or "full")  # else the modes differ, too
    if kind == "segmentation" and runs[0].role == "negative control" and alike and "gain" in row["metrics"].get("dice", {}):
        row["passed"] = passes(row["metrics"]["dice"]["gain"])
    return row


def _reference(kind: str, run: Run, groups: Sequence[Sequence[Run]]) -> Sequence[Run]:
    """The baseline of the same data and labels; of segmentation, the network of the same family that is wholly trained from scratch, if there is one."""
    found = [own for own in groups if own[0].method == REFERENCES[kind] and own[0].dataset == run.dataset and own[0].labels == run.labels]
    found = [own for own in found if own[0].family == run.family or kind != "segmentation" and None in (own[0].family, run.family)]
    found.sort(key=lambda own: (own[0].mode not in ("full", None), own[0].mode != run.mode))
    return found[0] if found and run not in found[0] and run.role != "upper bound" else ()


def _pairs(runs: Sequence[Run], base: Sequence[Run], strict: bool) -> Pairs:
    """By seed; where the reference lacks it, there is no pair, or if not `strict`, all runs of the reference for each."""
    same = [(run, [other for other in base if other.seed == run.seed]) for run in runs]
    if strict or all(partners for _, partners in same):
        return [(run, partners) for run, partners in same if partners]
    return [(run, base) for run in runs] if base else []


def _metric(name: str, runs: Sequence[Run], pairs: Pairs) -> dict[str, Any]:
    """Estimate and value of each run; where there is a reference, the difference to it, in the order of the runs that have a partner."""
    found: dict[str, Any] = {**_mean(runs, name).as_dict(), "each": [_json(_value(run, name)) for run in runs]}
    usable = [(run, partners) for run, partners in pairs if all(_has(one, name) for one in (run, *partners))]
    if not usable:
        return found
    if all(one.of_cases(name) for run, partners in usable for one in (run, *partners)):
        gain, relative, each = _by_case(name, usable)
    else:
        values = [(_value(run, name), _average([_value(other, name) for other in partners])) for run, partners in usable]
        each = [(ours - base, relative_gain(ours, base)) for ours, base in values]
        gain = over_seeds(_numbered([difference for difference, _ in each]))
        relative = relative_gain(_average([ours for ours, _ in values]), _average([base for _, base in values]))
    return found | {
        "gain": {
            **gain.as_dict(),
            "relative": _json(relative),
            "each": [_json(difference) for difference, _ in each],
            "each_relative": [_json(share) for _, share in each],
            "above": sum(difference > 0 for difference, _ in each),
        }
    }


def _by_case(name: str, pairs: Pairs) -> tuple[Estimate, float, list[tuple[float, float]]]:
    """Difference over all seeds, relative difference, and both of each seed."""
    ours = [run.of_cases(name) for run, _ in pairs]
    base = [_seeds_mean([other.of_cases(name) for other in partners]) for _, partners in pairs]
    each = [_compared(one, other) for one, other in zip(ours, base)]
    return paired_difference(_seeds_mean(ours), _seeds_mean(base)), _compared(_seeds_mean(ours), _seeds_mean(base))[1], each


def _compared(ours: Mapping[str, float], base: Mapping[str, float]) -> tuple[float, float]:
    """Mean difference over the cases that both have a figure of, and its share of the reference's mean."""
    both = [case for case in sorted(ours) if math.isfinite(ours[case]) and math.isfinite(base.get(case, math.nan))]
    mean, reference = (_average([cases[case] for case in both]) for cases in (ours, base))
    return mean - reference, relative_gain(mean, reference)


def _mean(runs: Sequence[Run], name: str, label: str | None = None) -> Estimate:
    of_cases = [cases for run in runs if (cases := run.of_cases(name, label))]
    if of_cases:
        return bootstrap_mean(list(_seeds_mean(of_cases).values()))
    known = [run for run in runs if name in run.figures]
    estimates = [value for run in known if isinstance(value := run.figures[name], Mapping)]
    if estimates and len(estimates) == len(known):
        mean, low, high = (_average([number(value.get(key)) for value in estimates]) for key in ("mean", "low", "high"))
        return Estimate(mean, low, high, min(int(value.get("count") or 0) for value in estimates))
    return over_seeds(_numbered([_value(run, name) for run in known]))


def _seeds_mean(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return mean_of_seeds({f"run {place}": cases for place, cases in enumerate(runs)})


def _numbered(values: Sequence[float]) -> dict[str, float]:
    return {f"run {place}": value for place, value in enumerate(values)}


def _value(run: Run, name: str) -> float:
    """A run's figure: the mean over its cases, or what it says as a whole."""
    if cases := run.of_cases(name):
        return _average([value for value in cases.values() if math.isfinite(value)])
    value = run.figures.get(name)
    return number(value.get("mean") if isinstance(value, Mapping) else value)


def _has(run: Run, name: str) -> bool:
    return bool(run.of_cases(name)) or name in run.figures


def _average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None
