"""progress.png: the curves of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl_ext.core.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]

SHOWN = ("/std", "/rank_share", "/MI")  # of the health figures; the page of the run shows all


def series(records: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    """Epochs (counted from 1) and values of a metric, where it was measured and finite."""
    points = [(record["epoch"] + 1, record[key]) for record in records if isinstance(record.get(key), (int, float)) and math.isfinite(record[key])]
    return [float(epoch) for epoch, _ in points], [float(value) for _, value in points]


def names(records: Sequence[Record], *prefixes: str) -> list[str]:
    """Metrics whose names begin with one of `prefixes`, sorted."""
    return sorted({key for record in records for key in record if key.startswith(prefixes)})


def draw_progress(records: Sequence[Record], path: Path) -> None:
    """Curves of losses, probe and health (where there are any), learning rate and throughput over the epochs."""
    from matplotlib.figure import Figure  # here: it takes a second, which the start of a training can do without
    from matplotlib.ticker import MaxNLocator

    shown = {"probe": names(records, "probe/"), "health": [key for key in names(records, "health/") if key.endswith(SHOWN)]}
    extra = {name: keys for name, keys in shown.items() if keys}
    figure = Figure(figsize=(10, 11 + 3 * len(extra)), dpi=90, layout="constrained")
    axes = iter(figure.subplots(3 + len(extra), 1, sharex=True))
    _plot(next(axes), records, names(records, "train/", "val/"), "loss")
    for name, keys in extra.items():
        _plot(next(axes), records, keys, name)
    _plot(next(axes), records, ["lr"], "learning rate")
    speed = next(axes)
    _plot(speed, records, ["samples_per_second"], "samples per second")
    share = speed.twinx()
    epochs, values = series(records, "data_wait_share")
    share.plot(epochs, [100 * value for value in values], color="tab:red", alpha=0.6)
    share.set_ylabel("waiting for data, %", color="tab:red")
    share.set_ylim(0, 100)
    speed.set_ylim(bottom=0)
    speed.set_xlabel("epoch")
    speed.xaxis.set_major_locator(MaxNLocator(integer=True))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _plot(axis: Axes, records: Sequence[Record], keys: Sequence[str], label: str) -> None:
    for key in keys:
        axis.plot(*series(records, key), "--" if key.startswith("val/") else "-", marker="." if len(records) < 30 else "", label=key)
    if len(keys) > 1:
        axis.legend(fontsize=8, ncols=2 if len(keys) > 6 else 1)
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
