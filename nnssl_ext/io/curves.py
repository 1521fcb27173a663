"""Curves as inline SVG for pages: small, sharp at any size, and drawn in a millisecond."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = tuple[Sequence[float], Sequence[float]]  # x, y

COLOURS = ("#0b6e99", "#d9480f", "#2b8a3e", "#862e9c", "#e8590c", "#5f3dc4", "#087f5b", "#a61e4d")
WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 30
MOST_POINTS = 400  # of a curve; more can't be seen


def curves(series: Mapping[str, Points], x_label: str = "epoch") -> str:
    """An SVG element with axes, grid, and a legend where there are several curves.

    Args:
        series: x and y by name; a name that begins with "val" is dashed.
        x_label: below the x axis.
    """
    drawn = {name: points for name, points in series.items() if len(points[0])}
    if not drawn:
        return ""
    xs, ys = ticks(*_range(drawn, 0), whole=True), ticks(*_range(drawn, 1))
    x_low, x_high = _range(drawn, 0)
    x_low, x_high = (x_low - 0.5, x_high + 0.5) if x_low == x_high else (x_low, x_high)
    frame = Frame(x_low, x_high, min(ys), max(ys))
    parts = frame.opening(", ".join(drawn), {x: _number(x) for x in xs if x_low <= x <= x_high}, ys, x_label)
    for number, (name, (x_values, y_values)) in enumerate(drawn.items()):
        points = [f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in _thinned(list(zip(x_values, y_values)))]
        style = f'stroke="{COLOURS[number % len(COLOURS)]}"' + (' stroke-dasharray="5 4"' if name.startswith("val") else "")
        parts.append(f'<polyline fill="none" stroke-width="1.8" {style} points="{" ".join(points)}"/>')
        if len(points) == 1:
            parts.append(f'<circle r="3" fill="{COLOURS[number % len(COLOURS)]}" cx="{points[0].split(",")[0]}" cy="{points[0].split(",")[1]}"/>')
    entries = [(COLOURS[n % len(COLOURS)], name, f"&nbsp;<b>{_number(drawn[name][1][-1])}</b>") for n, name in enumerate(drawn)]
    return "".join([*parts, "</svg>", legend(entries)])


@dataclass(frozen=True)
class Frame:
    """Where the values of a drawing lie in it."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def opening(self, name: str, xs: Mapping[float, str], ys: Sequence[float], x_label: str) -> list[str]:
        """The opening SVG tag with grid and ticks.

        Args:
            name: for those who can't see the drawing.
            xs: texts of the x axis by place.
            ys: ticks of the y axis.
            x_label: below the x axis.
        """
        parts = [f'<svg class="curves" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">']
        for y in ys:
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(y):.1f}" y2="{self.y(y):.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{self.y(y) + 4:.1f}" text-anchor="end">{_number(y)}</text>')
        parts += [f'<text x="{self.x(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>' for x, text in xs.items()]
        return [*parts, f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(x_label)}</text>']


def legend(entries: Sequence[tuple[str, str, str]]) -> str:
    """Below a drawing: colour, name and what follows it (HTML) of each line."""
    spans = [f'<span><i style="background:{colour}"></i>{escape(name)}{after}</span>' for colour, name, after in entries]
    return "".join(['<div class="legend">', *spans, "</div>"])


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that enclose low to high."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        spread = abs(low) * 0.1
        low, high = (low, low + 1) if whole or not spread else (low - spread, high + spread)
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _range(series: Mapping[str, Points], axis: int) -> tuple[float, float]:
    values = [value for points in series.values() for value in points[axis]]
    return min(values), max(values)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS of them: of each group the lowest and the highest, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        kept += sorted({min(group, key=lambda p: p[1]), max(group, key=lambda p: p[1])})
    return [*kept[:-1], points[-1]]


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3g}"
