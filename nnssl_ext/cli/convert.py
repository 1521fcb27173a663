"""nnssl_convert: write a raw dataset from any layout, or a collection of crops."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_ext.cli.common import SOME_FAILED, add_workers, at_least_one, parser, run, workers

if TYPE_CHECKING:
    from nnssl_ext.io.case import Case


def arguments() -> argparse.ArgumentParser:
    result = parser(
        "nnssl_convert",
        "Write nnssl_raw/DatasetXXX_NAME from a downloaded dataset, or a collection of crops of fixed size.",
        "nnssl_convert /data/BraTS18 -d 801 -name BraTS18 -np 8\n  nnssl_convert 801 -d 805 -name CROPS --crops 1000 -size 128 128 128 -foreground 0.7",
    )
    result.add_argument("source", metavar="SOURCE", help="folder of the dataset, or ID or name of a raw dataset")
    result.add_argument("-d", metavar="ID", type=int, required=True, help="ID of the dataset to write")
    result.add_argument("-name", metavar="NAME", required=True, help="its name")
    result.add_argument("-layout", metavar="LAYOUT", help="how the source is laid out (default: found out)")
    result.add_argument("-modality", metavar="M", nargs="+", default=[], help="modality of each channel, such as CT, where the layout doesn't tell")
    result.add_argument(
        "-format",
        choices=("nnunet", "pretrain_data"),
        help="nnunet: dataset.json alone; pretrain_data: pretrain_data.json too, which splits channels (default: both if there is one channel)",
    )
    add_workers(result)
    result.add_argument("--crops", metavar="N", type=at_least_one, help="cut N random crops instead of converting whole volumes")
    result.add_argument("-size", metavar=("Z", "Y", "X"), nargs=3, type=at_least_one, default=(128, 128, 128), help="voxels of a crop (default: 128 128 128)")
    result.add_argument("-spacing", metavar=("Z", "Y", "X"), nargs=3, type=float, default=(1.5, 1.5, 1.5), help="mm of a crop's voxels (default: 1.5 1.5 1.5)")
    result.add_argument("-foreground", metavar="F", type=float, default=0.7, help="least share of the body in a crop (default: 0.7)")
    result.add_argument("-seed", metavar="S", type=int, default=0, help="seed of the crops (default: 0)")
    return result


def main(argv: list[str] | None = None) -> int:
    return run(arguments(), _main, argv)


def _main(options: argparse.Namespace) -> int:
    from nnssl_ext.core.errors import UserError
    from nnssl_ext.core.paths import RAW, dataset_name, datasets, raw_folder, root
    from nnssl_ext.io.layouts import find_entries
    from nnssl_ext.preprocessing.convert import convert
    from nnssl_ext.preprocessing.crops import CropPlan, cut_crops

    name = f"Dataset{options.d:03d}_{options.name}"
    others = [other for other in datasets(root(RAW)).get(options.d, []) if other != name]
    if others:
        raise UserError(f"ID {options.d} belongs to {others[0]}", root(RAW), "choose another ID")
    if options.d < 0 or not re.fullmatch(r"[\w.-]+", options.name, re.ASCII):
        raise UserError(f"'{options.name}' with ID {options.d} makes no dataset name", "options -d and -name", "use a positive ID, letters, digits, - and _")
    folder = Path(options.source)
    if not folder.is_dir():
        folder = raw_folder(dataset_name(options.source, (RAW,)))
    settings = {"source": str(folder.resolve()), "layout": options.layout, "modality": options.modality}
    if options.crops is None:
        failed = convert(find_entries(folder, options.layout, options.modality, options.np), name, settings, workers(options), options.format)
    else:
        plan = CropPlan(options.size, options.spacing, options.foreground, options.seed)
        failed = cut_crops(_cases(folder, options), name, options.crops, plan, settings, workers(options), options.format)
    return SOME_FAILED if failed else 0


def _cases(folder: Path, options: argparse.Namespace) -> list[Case]:
    """The cases to cut crops from: those of a raw dataset as it is read for training, else what the layout says without its test set."""
    from nnssl_ext.io.index import read_index
    from nnssl_ext.io.layouts import find_entries

    if options.layout is None and (folder / "pretrain_data.json").is_file():
        return read_index(folder)
    return [entry.case for entry in find_entries(folder, options.layout, options.modality, options.np).entries if not entry.test]
