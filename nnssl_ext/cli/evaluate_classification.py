"""nnssl_evaluate_classification: how well the frozen features of a checkpoint tell the classes of volumes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_ext.cli.common import CHECKPOINT_HELP, add_device, add_results, chosen_device, parser, run

if TYPE_CHECKING:
    from nnssl_ext.evaluation.statistics import Estimate


def arguments() -> argparse.ArgumentParser:
    result = parser(
        "nnssl_evaluate_classification",
        "Tell the classes of volumes by a linear head on frozen features, in folds of subjects, beside random weights and intensity statistics.",
        "nnssl_evaluate_classification -ckpt checkpoint_final.pth -labels labels.csv -images crops",
    )
    result.add_argument("-ckpt", metavar="CHECKPOINT", type=Path, required=True, help=CHECKPOINT_HELP)
    result.add_argument("-labels", metavar="FILE", type=Path, required=True, help="CSV with the columns case, subject and label")
    result.add_argument("-images", metavar="FOLDER", type=Path, required=True, help="folder of images named by the cases, or a raw dataset folder")
    result.add_argument("-modality", metavar="M", nargs="+", default=[], help="modality of each channel, where the plan knows several and no index tells")
    add_results(result, "prediction of each case")
    add_device(result)
    return result


def main(argv: list[str] | None = None) -> int:
    return run(arguments(), _main, argv)


def _main(options: argparse.Namespace) -> None:
    import numpy as np

    from nnssl_ext.evaluation.classification import RANDOM, cross_validated, features_of, held_out_folds, judge, matched, read_labels
    from nnssl_ext.evaluation.feature_files import find_cases
    from nnssl_ext.evaluation.results import check_writable, markdown, write_results
    from nnssl_ext.finetuning.pretrained import Pretrained

    if options.out:
        check_writable(options.out)
    device, lines = chosen_device(options), read_labels(options.labels)
    pretrained = Pretrained.load(options.ckpt)
    cases = matched(lines, find_cases([options.images], pretrained, options.modality))
    classes = sorted({line.label for line in lines})
    labels = np.array([classes.index(line.label) for line in lines])
    subjects = np.array([line.subject for line in lines])
    folds = len(set(held_out_folds(labels, subjects).tolist()))  # told before the features are computed
    predicted = {name: cross_validated(values, labels, subjects) for name, values in features_of(cases, pretrained, device).items()}
    found = judge(predicted, labels, subjects)
    head = ("features", "AUC [95 % CI]", f"gain over {RANDOM}", "accuracy [95 % CI]", f"gain over {RANDOM}")
    texts = [[one["method"], *(_text(one[key], "gain" in key) for key in ("auc", "auc_gain", "accuracy", "accuracy_gain"))] for one in found]
    counts = ", ".join(f"{name} {int((labels == number).sum())}" for number, name in enumerate(classes))
    print(f"{len(lines)} volumes of {len(set(subjects))} subjects ({counts}), {folds} folds, {pretrained.path}\n{markdown(head, texts)}")
    if options.out:
        rows = [
            {
                "method": name,
                "case": line.case,
                "subject": line.subject,
                "label": line.label,
                "fold": int(fold),
                **{f"p({known})": float(value) for known, value in zip(classes, values)},
            }
            for name, one in predicted.items()
            for line, fold, values in zip(lines, one.folds, one.probabilities)
        ]
        results = [{key: value.as_dict() if hasattr(value, "as_dict") else value for key, value in one.items()} for one in found]
        about = {"checkpoint": str(pretrained.path), "identity": pretrained.identity, "classes": classes, "folds": folds}
        table, record = write_results(options.out, rows, {**about, "results": results})
        print(f"each case: {table}; summary: {record}")


def _text(estimate: Estimate | None, signed: bool) -> str:
    return "-" if estimate is None else estimate.text(signed)


if __name__ == "__main__":
    sys.exit(main())
