"""Which overlap of two crops makes the best positive pairs? A study in miniature, on phantoms and a CPU.

``python -m benchmarks.learning.positives --out FOLDER``: SimSiam is pretrained with pairs whose IoU lies in each of some intervals, with
two seeds, and each result is fine-tuned with two seeds. FOLDER may be that of `benchmarks.learning`, with which it shares data and
baselines. The tables are FOLDER/positives.md and positives.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning.data import Data
from benchmarks.learning.finetune import finetune
from benchmarks.learning.study import Baseline, baseline, finetuning, trial
from benchmarks.learning.suite import TRANSFORMER, Entry
from nnssl_ext.benchmark.lanes import finish_all
from nnssl_ext.benchmark.units import Unit, environment
from nnssl_ext.core.files import FolderLock, write_json, write_text

INTERVALS = {"[0, 0]": (0.0, 0.0), "[0.0001, 0.3]": (0.0001, 0.3), "[0.3, 0.6]": (0.3, 0.6), "[0.6, 1]": (0.6, 1.0), "crops from anywhere": (0.0, 1.0)}
SEEDS = (0, 1)  # of pretraining, and of fine-tuning
FAMILY, STEPS, BATCH = "primus", 400, 16  # 0.25 s per step on one thread
Cell = tuple[int, int]


@dataclass(frozen=True)
class Interval:
    """Units of one interval: the pretraining seeds' probes, and fine-tunings by the seeds of pretraining and fine-tuning."""

    name: str
    probed: dict[int, Unit]
    finetuned: dict[Cell, Unit]
    chains: list[list[Unit]]


def interval(name: str, digest: str) -> Interval:
    """What belongs to one of `INTERVALS` on data with this hash."""
    entry = Entry("SimSiamIoUTrainer", FAMILY, STEPS, BATCH, {**TRANSFORMER, "iou": INTERVALS[name]})
    made = trial(entry, SEEDS, digest)
    tuned = {
        (first, second): Unit(f"finetune_{entry.name}_{first}_{second}", finetune, finetuning(FAMILY, second, digest), made.pretrained[first])
        for first in SEEDS
        for second in SEEDS
    }
    chains = [[made.pretrained[first], made.probed[first], *(tuned[first, second] for second in SEEDS)] for first in SEEDS]
    return Interval(name, made.probed, tuned, chains)


def rows(base: Baseline, intervals: Sequence[Interval], out: Path) -> list[dict[str, Any]]:
    """Values of random weights and scratch, then of each interval: k-NN by pretraining seed, Dice by both seeds; what is missing is left out."""
    found = [{"positives": "none (from scratch)", "knn": _values(base.untrained, "knn_dice", out), "dice": _values(base.scratch, "dice", out)}]
    return found + [{"positives": one.name, "knn": _values(one.probed, "knn_dice", out), "dice": _values(one.finetuned, "dice", out)} for one in intervals]


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: means with standard deviations, and each value."""
    lines = ["| IoU of the positives | k-NN Dice | each | Dice, fine-tuned | each |", "|---|---|---|---|---|"]
    for row in found:
        cells = [text for key in ("knn", "dice") for text in (_spread(row[key]), ", ".join(f"{value:.3f}" for value in row[key]))]
        lines.append(f"| {' | '.join((row['positives'], *cells))} |")
    return "\n".join(lines) + "\n"


def _values(units: Mapping[Any, Unit], key: str, out: Path) -> list[float]:
    records = [unit.record(out) for unit in units.values()]
    return [record["result"][key] for record in records if record is not None]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else "-"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.learning.positives", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of data, records and tables")
    parser.add_argument("--lanes", type=int, default=2, help="processes, of one thread each")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    with FolderLock(out):
        data = Data(out)
        data.prepare(options.lanes)
        digest = data.digest()
        base = baseline(FAMILY, range(len(SEEDS) ** 2), digest)
        intervals = [interval(name, digest) for name in INTERVALS]
        errors = finish_all([unit for chain in (*base.chains(), *(chain for one in intervals for chain in one.chains)) for unit in chain], out, options.lanes)
        found = rows(base, intervals, out)
        write_json(out / "positives.json", {**environment(), "data": digest, "rows": found})
        write_text(out / "positives.md", table(found))
    print(table(found))
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
