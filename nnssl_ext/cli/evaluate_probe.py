"""nnssl_evaluate_probe: how well the frozen features of a checkpoint tell organs apart, from few labelled volumes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nnssl_ext.cli.common import CHECKPOINT_HELP, add_device, add_results, at_least_one, chosen_device, parser, run


def arguments() -> argparse.ArgumentParser:
    result = parser(
        "nnssl_evaluate_probe",
        "Tell organs apart by the frozen features of single cells, learned from few labelled volumes, beside random weights and raw intensities.",
        "nnssl_evaluate_probe -ckpt checkpoint_final.pth -d 902 -n 1 5 10",
    )
    result.add_argument("-ckpt", metavar="CHECKPOINT", type=Path, required=True, help=CHECKPOINT_HELP)
    result.add_argument("-d", metavar="ID", required=True, help="labelled dataset in nnU-Net's raw format, in $nnUNet_raw or $nnssl_raw; ID or name")
    result.add_argument("-n", metavar="N", type=at_least_one, nargs="+", help="labelled volumes to learn from (default: those of 1, 5 and 10 that there are)")
    add_results(result, "Dice of each test case")
    add_device(result)
    return result


def main(argv: list[str] | None = None) -> int:
    return run(arguments(), _main, argv)


def _main(options: argparse.Namespace) -> None:
    from nnssl_ext.evaluation.probe import dataset_folder
    from nnssl_ext.evaluation.results import check_writable, markdown, write_results
    from nnssl_ext.evaluation.token_probe import RANDOM, evaluate, summary
    from nnssl_ext.finetuning.pretrained import Pretrained

    if options.out:
        check_writable(options.out)
    device, folder = chosen_device(options), dataset_folder(options.d)
    pretrained = Pretrained.load(options.ckpt)
    rows = evaluate(pretrained, folder, options.n, device)
    found = summary(rows)
    head = ("volumes", "classifier", "features", "test cases", "Dice [95 % CI]", f"gain over {RANDOM} [95 % CI]")
    lines = [
        [
            str(one["volumes"]),
            one["classifier"],
            one["method"],
            str(one["dice"].count),
            one["dice"].text(),
            one["gain"].text(signed=True) if one["gain"] else "-",
        ]
        for one in found
    ]
    print(f"{folder.name}, {pretrained.path}\n{markdown(head, lines)}")
    if options.out:
        estimates = [{**one, "dice": one["dice"].as_dict(), "gain": one["gain"] and one["gain"].as_dict()} for one in found]
        about = {"checkpoint": str(pretrained.path), "identity": pretrained.identity, "dataset": folder.name}
        table, record = write_results(options.out, rows, {**about, "results": estimates})
        print(f"each test case: {table}; summary: {record}")


if __name__ == "__main__":
    sys.exit(main())
