"""What a benchmark says: the rows of its tables, a sentence for each method, what a reader must not overlook, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nnssl_ext.benchmark.rows import NEGLIGIBLE, REFERENCES, Row, about, rows_of
from nnssl_ext.benchmark.runs import KINDS, Results, Run
from nnssl_ext.benchmark.suite import BOUND_LONGER
from nnssl_ext.evaluation.results import markdown
from nnssl_ext.evaluation.statistics import FEWEST_SEEDS

FEW_CASES = 10
NAMES = {  # of modes
    "full": "full fine-tuning",
    "encoder": "encoder only",
    "frozen": "frozen encoder",
    "adapter": "upsampling adapter",
    "mlp": "all-MLP decoder",
    "linear": "linear adapter",
}
METRICS = {  # figure: name in tables, decimals; the arrow points to better values
    "dice": ("Dice ↑", 3),
    "nsd": ("NSD ↑", 3),
    "hd95_mm": ("HD95, mm ↓", 2),
    "assd_mm": ("ASSD, mm ↓", 2),
    "tre_mm": ("TRE, mm ↓", 2),
    "epe_mm": ("end-point error, mm ↓", 2),
    "sd_log_j": ("SDlogJ", 3),
    "folded": ("folded", 4),
    "knn_dice": ("Dice, k-NN ↑", 3),
    "linear_dice": ("Dice, linear ↑", 3),
    "auc": ("AUC ↑", 3),
    "accuracy": ("accuracy ↑", 3),
    "seconds": ("s", 1),
    "cpu_seconds": ("CPU-s", 1),
    "memory_gb": ("GB", 2),
}


def summarise(results: Results) -> dict[str, Any]:
    """The content of summary.json."""
    tables = {kind: rows_of(kind, results.done(kind)) for kind in REFERENCES}
    failed = [{"kind": run.kind, **about([run]), "error": run.error} for run in results.runs if run.error]
    alarms = [{"kind": run.kind, **about([run]), "alarms": list(run.alarms)} for run in results.runs if run.alarms]
    head = {"version": results.version, "command": results.command, "digest": results.digest}
    said = {"headline": headline(tables["segmentation"]), "remarks": remarks(results, tables)}
    return {**head, **said, **tables, "cost": cost(results.runs), "alarms": alarms, "failed": failed}


def metric_name(name: str) -> str:
    return METRICS[name][0] if name in METRICS else name.replace("_", " ")


def figure(name: str, value: float | None, signed: bool = False) -> str:
    """A metric's value as shown; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:{'+' if signed else ''}.{METRICS.get(name, ('', 3))[1]}f}"


def interval(name: str, estimate: Mapping[str, Any], signed: bool = False) -> str:
    """Such as "[0.012, 0.049]"; "" where there is none."""
    return "" if estimate["low"] is None else f"[{figure(name, estimate['low'], signed)}, {figure(name, estimate['high'], signed)}]"


def estimate_text(name: str, estimate: Mapping[str, Any], signed: bool = False) -> str:
    return f"{figure(name, estimate['mean'], signed)} {interval(name, estimate, signed)}".strip()


def percent(share: float | None) -> str:
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:+.1f} %"


def verdict(gain: Mapping[str, Any]) -> str:
    """What a difference says: "above" or "below" when the interval excludes 0 and every run agrees, "runs disagree", "open", "unknown" without interval."""
    if gain["low"] is None:
        return "unknown"
    if gain["low"] <= 0 <= gain["high"]:
        return "open"
    side = "above" if gain["low"] > 0 else "below"
    return side if gain["above"] == (len(gain["each"]) if side == "above" else 0) else "runs disagree"


def setting_name(row: Row) -> str:
    """Mode and number of labelled cases."""
    labels = "" if row["labels"] is None else f"{row['labels']} labelled case{'s' if row['labels'] != 1 else ''}"
    return ", ".join(part for part in (NAMES.get(row["mode"], row["mode"] or ""), labels) if part)


def headline(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A sentence for every method, control and bound, of each dataset and family at the fewest labels, in the mode that trains everything if there is one."""
    sentences = []
    for dataset, family in dict.fromkeys((row["dataset"], row["family"]) for row in rows):
        own = [row for row in rows if (row["dataset"], row["family"]) == (dataset, family) and "dice" in row["metrics"]]
        compared = [row for row in own if row["role"] != "upper bound"]
        if not compared:
            continue
        modes = {row["mode"] for row in compared}
        first = [row for row in compared if row["mode"] == ("full" if "full" in modes else compared[0]["mode"]) or row["mode"] is None]
        fewest = min((row["labels"] for row in first if row["labels"] is not None), default=None)
        shown = [row for row in first if row["labels"] == fewest] + [row for row in own if row["role"] == "upper bound"]
        place = ", ".join(part for part in (dataset, family, setting_name(first[0] | {"labels": fewest})) if part)
        sentences += [{key: row[key] for key in ("id", "method", "role")} | {"place": place, "text": _sentence(row)} for row in best_first(shown)]
    return sentences


def best_first(rows: Sequence[Row]) -> list[Row]:
    """Baselines, then methods from the highest Dice down, negative controls, upper bounds."""
    places = ("baseline", "method", "negative control", "upper bound")
    return sorted(rows, key=lambda row: (places.index(row["role"]), -(row["metrics"].get("dice", {}).get("mean") or 0.0), row["method"]))


def _sentence(row: Row) -> str:
    """What is said of a row after its method's name."""
    dice = row["metrics"]["dice"]
    text = f"Dice {estimate_text('dice', dice)}"
    if row["role"] == "upper bound":
        return f"{text}, {setting_name(row)}."
    if "gain" not in dice:
        return f"{text}."
    gain, base = dice["gain"], row["reference"]["method"]
    said = {
        "above": f"better than {base}",
        "below": f"worse than {base}",
        "open": f"no difference to {base} shown, the interval contains 0",
        "runs disagree": f"no difference to {base} shown, the runs disagree",
        "unknown": f"compared with {base} on too few cases for an interval",
    }
    judged = said[verdict(gain)] if "passed" not in row else f"{'passed' if row['passed'] else 'NOT PASSED'}, {control_text(row)}"
    change = f"{estimate_text('dice', gain, signed=True)} ({percent(gain['relative'])}), above {base} in {gain['above']} of {len(gain['each'])} runs"
    return f"{judged}. {text}, {change}."


def control_text(row: Row) -> str:
    """Why a negative control passed or not."""
    gain = row["metrics"]["dice"]["gain"]
    inside = gain["low"] is not None and gain["low"] <= 0 <= gain["high"]
    reasons = ["the interval contains 0"] * inside + [f"|gain| < {NEGLIGIBLE:g}"] * (gain["mean"] is not None and abs(gain["mean"]) < NEGLIGIBLE)
    failed = "it gains though it has learned nothing from images" if (gain["mean"] or 0.0) > 0 else "it loses"
    return " and ".join(reasons) or f"{failed}: the interval excludes 0 and |gain| is not below {NEGLIGIBLE:g}"


def remarks(results: Results, tables: Mapping[str, Sequence[Row]]) -> list[str]:
    """The suite's own remarks, then what follows from the numbers of seeds, cases and comparisons."""
    own = results.suite.get("remarks") or []
    found = [own] if isinstance(own, str) else [str(remark) for remark in own]
    rows = tables["segmentation"]
    methods = [row for row in rows if row["role"] == "method"]
    if methods:
        fewest, most = (choose(len(row["seeds"]) for row in methods) for choose in (min, max))
        if fewest < 2:
            found.append("One run only of some methods: nothing here says how much their results vary from seed to seed.")
        if most < FEWEST_SEEDS:
            found.append(
                f"Intervals draw cases, not trainings: how runs differ is not in them. Over seeds there is one from {FEWEST_SEEDS} on; every run is shown."
            )
        cases = min(row["cases"] for row in methods)
        if cases < FEW_CASES:
            found.append(f"Down to {cases} test case{'s' if cases != 1 else ''}: bootstrap intervals of so few cases are too short.")
        if not any(row["role"] == "negative control" for row in rows):
            found.append("No negative control was run: part of a gain may not come from what was learned from images.")
        if not any(row["role"] == "upper bound" for row in rows):
            found.append("No upper bound was run: how much there is to gain is not known.")
        elif results.suite.get("quick") is not None:
            found.append(f"The upper bound is trained {BOUND_LONGER} times as long as the others.")
    compared = sum("reference" in row for row in rows)
    if compared > 1:
        found.append(f"{compared} differences in Dice are tested, none is corrected for the number of comparisons.")
    failed = sum(bool(run.error) for run in results.runs)
    if failed:
        found.append(f"{failed} of {len(results.runs)} runs failed and are missing in the tables; they are listed under Health.")
    return found


def cost(runs: Sequence[Run]) -> list[Row]:
    """Seconds and CPU-seconds of each method and family, by kind of run."""
    rows = []
    for method, family in dict.fromkeys((run.method, run.family) for run in runs):
        own = [run for run in runs if (run.method, run.family) == (method, family) and run.seconds is not None]
        if own:
            kinds = {kind: _spent([run for run in own if run.kind == kind]) for kind in KINDS if any(run.kind == kind for run in own)}
            rows.append({"method": method, "family": family, "kinds": kinds, "total": _spent(own), "sources": about(own)["sources"]})
    return rows


def _spent(runs: Sequence[Run]) -> dict[str, Any]:
    cpu = [run.cpu_seconds for run in runs if run.cpu_seconds is not None]
    return {"runs": len(runs), "seconds": math.fsum(run.seconds or 0.0 for run in runs), "cpu_seconds": math.fsum(cpu) if len(cpu) == len(runs) else None}


def terminal_table(summary: Mapping[str, Any]) -> str:
    """The tables in Markdown, for the terminal."""
    blocks = []
    for kind in REFERENCES:
        rows = [row for row in summary[kind] if row["metrics"]]
        if rows:
            blocks.append(f"{kind.capitalize()}\n{markdown(*(_segmentation(rows) if kind == 'segmentation' else _others(rows)))}")
    lists = (
        (f"{said['method']} ({said['place']}): {said['text']}" for said in summary["headline"]),
        summary["remarks"],
        (f"FAILED: {one['kind']}, {one['method']}: {one['error']}" for one in summary["failed"]),
    )
    blocks += ["\n".join(f"- {line}" for line in lines) for lines in map(list, lists) if lines]
    return "\n\n".join(blocks)


def _segmentation(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    head = ["dataset", "family", "setting", "method", "runs", "Dice [95 % CI]", "gain over scratch [95 % CI]", "relative", "above in"]
    lines = []
    for row in rows:
        dice = row["metrics"].get("dice", {"mean": None, "low": None, "high": None})
        gain = dice.get("gain")
        compared = [estimate_text("dice", gain, True), percent(gain["relative"]), f"{gain['above']} of {len(gain['each'])}"] if gain else ["-"] * 3
        lines.append([*_about(row), str(len(row["seeds"])), estimate_text("dice", dice), *compared])
    return head, lines


def _others(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    head = ["dataset", "family", "setting", "method", *map(metric_name, metrics)]
    return head, [[*_about(row), *(estimate_text(name, row["metrics"][name]) if name in row["metrics"] else "-" for name in metrics)] for row in rows]


def _about(row: Row) -> list[str]:
    role = f" ({row['role']})" if row["role"] in ("negative control", "upper bound") else ""
    return [row["dataset"] or "-", row["family"] or "-", setting_name(row) or "-", row["method"] + role]
