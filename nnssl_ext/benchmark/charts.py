"""Drawings of a benchmark: Dice against the number of labelled cases, and curves of trainings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from nnssl_ext.benchmark.rows import Row
from nnssl_ext.benchmark.runs import Run
from nnssl_ext.io.curves import COLOURS, Frame, Points, curves, legend, ticks

PLAIN = "currentColor"  # of baselines
APART = 0.05  # octaves between the marks of two methods
MARGIN = 0.35  # octaves beside the fewest and the most labels


def label_efficiency(rows: Sequence[Row]) -> str:
    """An SVG element: a line per method through its means, bars from the lowest to the highest run; baselines in the text's colour, bounds as level lines.

    Args:
        rows: of one dataset, family and mode, with the bounds; those without a Dice or a number of labels are left out.
    """
    known = [row for row in rows if row["labels"] and row["metrics"].get("dice", {}).get("mean") is not None]
    lines: dict[str, list[Row]] = {}
    for row in sorted((row for row in known if row["role"] != "upper bound"), key=lambda row: row["labels"]):
        lines.setdefault(row["method"], []).append(row)
    bounds = [row for row in known if row["role"] == "upper bound"]
    numbers = sorted({row["labels"] for own in lines.values() for row in own})
    if len(numbers) < 2:
        return ""
    ys = ticks(*_range(known))
    frame = Frame(math.log2(numbers[0]) - MARGIN, math.log2(numbers[-1]) + MARGIN, min(ys), max(ys))
    parts = frame.opening("Dice by labelled cases", {math.log2(count): str(count) for count in numbers}, ys, "labelled cases")
    entries, colours = [], iter(COLOURS * (1 + len(lines) // len(COLOURS)))
    for place, (method, own) in enumerate(lines.items()):
        colour = PLAIN if own[0]["role"] == "baseline" else next(colours)
        parts += _line(frame, own, colour, APART * (place - (len(lines) - 1) / 2))
        entries.append((colour, method, " (negative control)" if own[0]["role"] == "negative control" else ""))
    for row in bounds:
        y = frame.y(row["metrics"]["dice"]["mean"])
        parts.append(
            f'<line stroke="{PLAIN}" stroke-dasharray="7 4" x1="{frame.x(frame.x_low):.1f}" x2="{frame.x(frame.x_high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text x="{frame.x(frame.x_low) + 6:.1f}" y="{y - 5:.1f}">upper bound: {escape(row["method"])}, all {row["labels"]} labelled cases</text>'
        )
    return "".join([*parts, "</svg>", legend(entries)])


def _line(frame: Frame, rows: Sequence[Row], colour: str, shift: float) -> list[str]:
    parts, points = [], []
    dashed = ' stroke-dasharray="2 3"' if rows[0]["role"] == "negative control" else ""
    for row in rows:
        dice, x = row["metrics"]["dice"], frame.x(math.log2(row["labels"]) + shift)
        each = [value for value in dice["each"] if value is not None]
        points.append(f"{x:.1f},{frame.y(dice['mean']):.1f}")
        ends = f"{row['method']}, {row['labels']} labelled cases: {dice['mean']:.3f}, runs {min(each):.3f} to {max(each):.3f}"
        parts.append(f'<line stroke="{colour}" stroke-width="1.4" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.y(min(each)):.1f}" y2="{frame.y(max(each)):.1f}"/>')
        parts.append(f'<circle r="3.2" fill="{colour}" cx="{x:.1f}" cy="{frame.y(dice["mean"]):.1f}"><title>{escape(ends)}</title></circle>')
    return [f'<polyline fill="none" stroke-width="1.8" stroke="{colour}"{dashed} points="{" ".join(points)}"/>', *parts]


def _range(rows: Sequence[Row]) -> tuple[float, float]:
    values = [value for row in rows for value in (row["metrics"]["dice"]["mean"], *row["metrics"]["dice"]["each"]) if value is not None]
    return min(values), max(values)


def training_curves(runs: Sequence[Run], by_method: bool) -> list[tuple[str, str, list[Run]]]:
    """Title, SVG and runs of every chart.

    Args:
        runs: those with curves are drawn.
        by_method: a chart for all runs of a method (losses of different methods can't be compared); else one for the first run of every method in a setting.
    """
    charts = []
    for title, own in _groups(runs, by_method).items():
        for part in dict.fromkeys(name.rpartition("/")[2] for run in own for name in run.curves):
            lines = {
                _line_name(run, name.rpartition("/")[0], by_method): points(curve)
                for run in own
                for name, curve in run.curves.items()
                if name.rpartition("/")[2] == part
            }
            if svg := curves(lines, "step"):
                charts.append((f"{title}: {part}", svg, [run for run in own if run.curves]))
    return charts


def points(curve: Sequence[Sequence[float | None]]) -> Points:
    """Steps and values of a curve without those that are not finite."""
    known = [(step, value) for step, value in curve if step is not None and value is not None and math.isfinite(value)]
    return [step for step, _ in known], [value for _, value in known]


def _groups(runs: Sequence[Run], by_method: bool) -> Mapping[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        labels = None if run.labels is None else f"{run.labels} labelled cases"
        setting = (run.method, run.family) if by_method else (run.dataset, run.family, run.mode, labels)
        own = groups.setdefault(", ".join(part for part in setting if part), [])
        if by_method or run.method not in [other.method for other in own]:
            own.append(run)
    return groups


def _line_name(run: Run, split: str, by_method: bool) -> str:
    """Of a curve; "val" comes first, for such curves are dashed."""
    seeds = "·".join(str(seed) for seed in run.seeds if seed is not None)
    return ", ".join(part for part in (split, f"seed {seeds or '–'}" if by_method else run.method) if part)
