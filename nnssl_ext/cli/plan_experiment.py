"""nnssl_plan_experiment: derive plans from a fingerprint."""

from __future__ import annotations

import argparse

from nnssl_ext.cli.common import add_dataset, add_planning, parser, run


def arguments() -> argparse.ArgumentParser:
    result = parser("nnssl_plan_experiment", "Derive spacing, patch size, normalisation and networks from the fingerprint.", "nnssl_plan_experiment -d 801")
    add_dataset(result)
    add_planning(result)
    return result


def main(argv: list[str] | None = None) -> int:
    return run(arguments(), _main, argv)


def _main(options: argparse.Namespace) -> int:
    from nnssl_ext.core.paths import PREPROCESSED, RAW, dataset_name
    from nnssl_ext.planners.planner import plan_experiment

    for number in options.d:
        plan = plan_experiment(dataset_name(number, (PREPROCESSED, RAW)), options.pl, options.p, options.gpu_memory_target)
        print(f"{plan.dataset_name}, plans {plan.plans_name}:", *plan.decisions, sep="\n  ")
    return 0
