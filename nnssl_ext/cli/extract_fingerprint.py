"""nnssl_extract_fingerprint: read every case of a dataset once."""

from __future__ import annotations

import argparse

from nnssl_ext.cli.common import SOME_FAILED, add_dataset, add_workers, parser, run, workers


def arguments() -> argparse.ArgumentParser:
    result = parser("nnssl_extract_fingerprint", "Read every case of a dataset and record what planning needs.", "nnssl_extract_fingerprint -d 801 -np 8")
    add_dataset(result)
    add_workers(result)
    return result


def main(argv: list[str] | None = None) -> int:
    return run(arguments(), _main, argv)


def _main(options: argparse.Namespace) -> int:
    from nnssl_ext.core.paths import RAW, dataset_name
    from nnssl_ext.planners.fingerprint import extract_fingerprint

    names = [dataset_name(number, (RAW,)) for number in options.d]
    failed = [extract_fingerprint(name, workers(options))["failed"] for name in names]
    return SOME_FAILED if any(failed) else 0
