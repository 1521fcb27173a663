"""nnssl_evaluate_segmentation: predicted label maps against a reference, and against those of another method."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_ext.cli.common import parser, run

if TYPE_CHECKING:
    from nnssl_ext.evaluation.segmentation_metrics import Comparison


def arguments() -> argparse.ArgumentParser:
    result = parser(
        "nnssl_evaluate_segmentation",
        "Dice, normalised surface Dice and 95th percentile of the surface distance of label maps, with the interval of the gain over another method.",
        "nnssl_evaluate_segmentation -pred finetuned -ref labelsTs -compare scratch -out results/organs",
    )
    result.add_argument("-pred", metavar="FOLDER", type=Path, required=True, help="predicted label maps")
    result.add_argument("-ref", metavar="FOLDER", type=Path, required=True, help="true label maps, named alike; all of them need a prediction")
    result.add_argument("-compare", metavar="FOLDER", type=Path, help="predictions of the method to compare with")
    result.add_argument("-out", metavar="FILE", type=Path, required=True, help="FILE.csv (each case and label) and FILE.json (summary) are written")
    result.add_argument("-tolerance", metavar="MM", type=_millimetres, default=2.0, help="of the normalised surface Dice (default: %(default)s)")
    return result


def _millimetres(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"'{text}' is no length in mm")
    return value


def main(argv: list[str] | None = None) -> int:
    return run(arguments(), _main, argv)


def _main(options: argparse.Namespace) -> None:
    from nnssl_ext.evaluation.results import check_writable, write_results
    from nnssl_ext.evaluation.segmentation_metrics import compare, evaluate

    check_writable(options.out)
    folders = [options.pred] + ([options.compare] if options.compare else [])
    found = evaluate(folders, options.ref, options.tolerance)
    rows = [
        {"method": folder.name, "case": case, "label": label, **figures} for folder, result in zip(folders, found) for (case, label), figures in result.items()
    ]
    comparisons = compare(found[0], found[1] if options.compare else None)
    about = {"pred": str(options.pred), "ref": str(options.ref), "compare": options.compare and str(options.compare), "tolerance_mm": options.tolerance}
    table, record = write_results(options.out, rows, {**about, "comparisons": [_entry(one) for one in comparisons]})
    print(_table(comparisons))
    print(f"each case and label: {table}; summary: {record}")


def _entry(one: Comparison) -> dict[str, object]:
    estimates = {"mean": one.ours, "compared": one.base, "gain": one.gain}
    return {"metric": one.metric, "label": one.label, **{name: estimate.as_dict() for name, estimate in estimates.items() if estimate is not None}}


def _table(comparisons: Sequence[Comparison]) -> str:
    from nnssl_ext.evaluation.results import markdown

    head = ["metric", "label", "cases", "mean [95 % CI]", "compared", "gain [95 % CI]"]
    rows = [
        [
            "hd95 (mm)" if one.metric == "hd95" else one.metric,
            "all" if one.label is None else str(one.label),
            str(one.ours.count),
            one.ours.text(),
            *(["-", "-"] if one.base is None or one.gain is None else [one.base.text(), one.gain.text(signed=True)]),
        ]
        for one in comparisons
    ]
    return markdown(*((head, rows) if comparisons[0].base else (head[:4], [row[:4] for row in rows])))


if __name__ == "__main__":
    sys.exit(main())
