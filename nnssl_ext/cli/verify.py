"""nnssl_verify: a verdict on every file of a dataset."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_ext.cli.common import SOME_FAILED, add_configurations, add_dataset, add_workers, parser, run, workers

if TYPE_CHECKING:
    from nnssl_ext.planners.fingerprint import Examination


def arguments() -> argparse.ArgumentParser:
    description = "Read every file of a dataset once, judge it, and show what was found on a page. Writes the fingerprint, too."
    result = parser("nnssl_verify", description, "nnssl_verify -d 801 -np 8")
    add_dataset(result)
    add_workers(result)
    what = result.add_mutually_exclusive_group()
    what.add_argument("--header_only", action="store_true", help="a quick look at sizes, spacings and missing files; no voxel is read")
    what.add_argument("--store", action="store_true", help="compare the preprocessed cases with their recorded hashes instead")
    result.add_argument("-p", metavar="PLANS", default="nnsslPlans", help="with --store: name of the plans (default: %(default)s)")
    add_configurations(result)
    return result


def main(argv: list[str] | None = None) -> int:
    return run(arguments(), _main, argv)


def _main(options: argparse.Namespace) -> int:
    from nnssl_ext.core.paths import PREPROCESSED, RAW, dataset_name

    names = [dataset_name(number, (PREPROCESSED,) if options.store else (RAW,)) for number in options.d]
    work = _verify_store if options.store else _verify_raw
    failed = [work(name, options) for name in names]
    return SOME_FAILED if any(failed) else 0


def _verify_raw(name: str, options: argparse.Namespace) -> bool:
    """Whether any case is quarantined."""
    from nnssl_ext.core.paths import preprocessed_folder
    from nnssl_ext.evaluation.integrity_page import write_integrity_page
    from nnssl_ext.planners.fingerprint import examine, examine_headers

    found = (examine_headers if options.header_only else examine)(name, workers(options))
    page = preprocessed_folder(name) / ("integrity_headers.html" if options.header_only else "integrity.html")
    write_integrity_page(page, found, workers(options), options.header_only)
    _summarize(found, page, options.header_only)
    return bool(found.failed)


def _summarize(found: Examination, page: Path, header_only: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from nnssl_ext.evaluation.integrity_page import by_kind

    console = Console(soft_wrap=True, highlight=False)
    counts = found.counts()
    console.print(f"\n{found.dataset_name}: {counts['ok']} ok, {counts['warning']} with warnings, {counts['quarantined']} quarantined", markup=False)
    if header_only:
        console.print("Only headers were read: voxels, intensities and duplicates were not checked.")
    kinds = by_kind(found)
    if kinds:
        table = Table("finding", "cases", "for example", box=None, pad_edge=False)
        for kind in kinds:
            table.add_row(kind.kind, str(len(kind.cases)), f"{kind.cases[0][0]}: {kind.cases[0][1]}")
        Console(highlight=False, markup=False).print(table)
    console.print(f"page: {page}", markup=False)


def _verify_store(name: str, options: argparse.Namespace) -> bool:
    """Whether any stored case is damaged."""
    from nnssl_ext.core.errors import UserError
    from nnssl_ext.core.paths import preprocessed_folder
    from nnssl_ext.core.plan import Plan
    from nnssl_ext.preprocessing.verify_store import verify_store

    file = preprocessed_folder(name) / f"{options.p}.json"
    if not file.is_file():
        raise UserError(f"the dataset has no plans '{options.p}'", file, f"nnssl_plan_experiment -d {name}")
    plan = Plan.load(file)
    folders = [file.parent / plan.configuration(configuration).data_identifier for configuration in options.c]
    damaged = [verify_store(folder, workers(options)) for folder in folders]
    return any(damaged)
