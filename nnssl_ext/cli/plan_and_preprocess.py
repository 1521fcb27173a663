"""nnssl_plan_and_preprocess: fingerprint, plan and preprocessing in one go."""

from __future__ import annotations

import argparse

from nnssl_ext.cli import extract_fingerprint, plan_experiment, preprocess
from nnssl_ext.cli.common import add_configurations, add_dataset, add_planning, add_storage, add_workers, parser, run


def arguments() -> argparse.ArgumentParser:
    example = "nnssl_plan_and_preprocess -d 801 802 -c 3d_fullres onemmiso"
    result = parser("nnssl_plan_and_preprocess", "Extract the fingerprint of datasets, plan them and preprocess their cases.", example)
    add_dataset(result)
    add_planning(result)
    add_configurations(result)
    add_workers(result)
    add_storage(result)
    result.set_defaults(part=0, total_parts=1, explain=False)
    return result


def main(argv: list[str] | None = None) -> int:
    return run(arguments(), _main, argv)


def _main(options: argparse.Namespace) -> int:
    return max([step._main(options) for step in (extract_fingerprint, plan_experiment, preprocess)])
