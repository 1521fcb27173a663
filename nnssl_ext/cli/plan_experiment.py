"""nnssl_plan_experiment: derive plans from a fingerprint."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nnssl_ext.cli.common import add_dataset, add_planning, parser, run

if TYPE_CHECKING:
    from nnssl_ext.core.plan import Plan


def arguments() -> argparse.ArgumentParser:
    result = parser("nnssl_plan_experiment", "Derive spacing, patch size, normalisation and networks from the fingerprint.", "nnssl_plan_experiment -d 801")
    add_dataset(result)
    add_planning(result)
    result.add_argument("--explain", action="store_true", help="say why, in plain words")
    return result


def main(argv: list[str] | None = None) -> int:
    return run(arguments(), _main, argv)


def _main(options: argparse.Namespace) -> int:
    from nnssl_ext.core.files import read_json
    from nnssl_ext.core.paths import PREPROCESSED, RAW, dataset_name, preprocessed_folder
    from nnssl_ext.planners.planner import plan_experiment

    for number in options.d:
        plan = plan_experiment(dataset_name(number, (PREPROCESSED, RAW)), options.pl, options.p, options.gpu_memory_target)
        print(f"{plan.dataset_name}, plans {plan.plans_name}:")
        if options.explain:
            print(*plan.decisions, sep="\n", end="\n\n")
        print(*table(plan), sep="\n", flush=True)
        from nnssl_ext.evaluation.plan_page import write_plan_page  # after the first answer: it draws, which takes a second to import

        folder = preprocessed_folder(plan.dataset_name)
        page = folder / f"{plan.plans_name}.html"
        write_plan_page(page, plan, read_json(folder / "dataset_fingerprint.json"))
        print(f"page: {page}" + ("" if options.explain else "; --explain gives the reasons"))
    return 0


def table(plan: Plan) -> list[str]:
    """One line per configuration."""
    families = list(dict.fromkeys(family for config in plan.configurations.values() for family in config.networks))
    rows = [["configuration", "spacing, mm", "median case", "patch", *(f"{family} (batch)" for family in families)]]
    for name, config in plan.configurations.items():
        spacing = "each case's own" if config.spacing is None else "x".join("*" if s is None else f"{s:.3g}" for s in config.spacing)
        sizes = ["x".join(map(str, shape)) for shape in (config.median_shape, config.patch_size)]
        networks = [config.networks.get(family) for family in families]
        rows.append([name, spacing, *sizes, *("-" if network is None else f"{network.size} ({network.batch_size})" for network in networks)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
