"""The figure of the stability study: curves of healthy runs, and where the alarms of the others fired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnssl_ext.core.files import atomic_path
from nnssl_ext.trainers.progress import series

Result = dict[str, Any]
COLOURS = {"dino": "tab:blue", "ibot": "tab:orange"}
PANELS = (
    ("KL(teacher || student), nat", "health/{}/KL"),
    ("loss (cross-entropy), nat", "train/{}"),
    ("teacher's entropy, share of log K", "health/{}/H_cond"),
    ("mutual information of image and prototype, nat", "health/{}/MI"),
)


def draw(path: Path, results: Mapping[str, Sequence[Result]], healthy: str = "healthy") -> None:
    """Write the figure.

    Args:
        path: PNG.
        results: of each variant, one per seed.
        healthy: the variant whose curves are shown in full.
    """
    figure = Figure(figsize=(13, 7.5), dpi=90, layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    for axis, (title, key) in zip(axes, PANELS):
        for name, colour in COLOURS.items():
            for number, result in enumerate(results.get(healthy, ())):
                _curve(axis, result, key.format(name), color=colour, label=name if number == 0 else None)
        axis.set_title(f"{healthy}: {title}", fontsize=9)
        axis.legend(fontsize=8)
    bad = [variant for variant in results if variant != healthy]
    for axis, (name, title) in zip(axes[4:], (("dino", "global token"), ("ibot", "patch tokens"))):
        for number, variant in enumerate(bad):
            for seed, result in enumerate(results[variant]):
                _with_alarms(axis, result, f"health/{name}/MI", f"C{number + 2}", variant if seed == 0 else None)
        for seed, result in enumerate(results.get(healthy, ())):
            _curve(axis, result, f"health/{name}/MI", color="0.6", label=healthy if seed == 0 else None)
        axis.set_title(f"all: MI of the {title}, nat (crosses: alarms)", fontsize=9)
        axis.legend(fontsize=8)
    for axis in axes:
        axis.set_xlabel("share of the run, %")
        axis.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _curve(axis: Axes, result: Result, key: str, **style: Any) -> tuple[list[float], list[float]]:
    epochs, values = series(result["records"], key)
    at = [100 * epoch / result["options"]["epochs"] for epoch in epochs]
    axis.plot(at, values, alpha=0.8, linewidth=1.2, **style)
    return at, values


def _with_alarms(axis: Axes, result: Result, key: str, colour: str, label: str | None) -> None:
    at, values = _curve(axis, result, key, color=colour, label=label)
    curve = dict(zip(at, values))
    fired = [100 * (record["epoch"] + 1) / result["options"]["epochs"] for record in result["records"] if record.get("alarms")]
    shown = [place for place in fired if place in curve]
    axis.plot(shown, [curve[place] for place in shown], "x", color=colour, markersize=9, markeredgewidth=2)
