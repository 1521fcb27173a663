"""nnssl_preprocess: preprocess the cases of planned datasets."""

from __future__ import annotations

import argparse
from functools import partial

from nnssl_ext.cli.common import SOME_FAILED, add_configurations, add_dataset, add_storage, add_workers, parser, run, workers


def arguments() -> argparse.ArgumentParser:
    result = parser("nnssl_preprocess", "Crop, normalise, resample and store the cases of planned datasets.", "nnssl_preprocess -d 801 -c 3d_fullres -np 8")
    add_dataset(result)
    result.add_argument("-p", metavar="PLANS", default="nnsslPlans", help="name of the plans (default: %(default)s)")
    add_configurations(result)
    add_workers(result)
    add_storage(result)
    result.add_argument("-part", metavar="K", type=int, default=0, help="do part K of -total_parts, counted from 0 (default: 0)")
    result.add_argument("-total_parts", metavar="N", type=int, default=1, help="parts that may run at the same time on several machines (default: 1)")
    return result


def main(argv: list[str] | None = None) -> int:
    return run(arguments(), _main, argv)


def _main(options: argparse.Namespace) -> int:
    from nnssl_ext.core.errors import UserError
    from nnssl_ext.core.paths import PREPROCESSED, RAW, dataset_name, preprocessed_folder
    from nnssl_ext.core.plan import Plan
    from nnssl_ext.preprocessing.preprocessor import preprocess

    if not 0 <= options.part < options.total_parts:
        raise UserError(f"there is no part {options.part} of {options.total_parts}", "options -part and -total_parts", "parts are counted from 0")
    part = (options.part, options.total_parts) if options.total_parts > 1 else None
    names = [dataset_name(number, (RAW, PREPROCESSED)) for number in options.d]
    files = [preprocessed_folder(name) / f"{options.p}.json" for name in names]
    for number, file in zip(options.d, files):
        if not file.is_file():
            raise UserError(f"the dataset has no plans '{options.p}'", file, f"nnssl_plan_experiment -d {number}")
    plans = [Plan.load(file) for file in files]
    for plan in plans:
        for configuration in options.c:
            plan.configuration(configuration)
    work = partial(preprocess, workers=workers(options), storage=options.storage, part=part, device=options.device)
    failed = [work(name, plan, configuration) for name, plan in zip(names, plans) for configuration in options.c]
    return SOME_FAILED if any(failed) else 0
