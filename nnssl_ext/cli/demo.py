"""nnssl_demo: the whole thread on embedded data, with a page to look at."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnssl_ext.cli.common import parser, run


def arguments() -> argparse.ArgumentParser:
    result = parser("nnssl_demo", "Plan, preprocess, pretrain, export and fine-tune on embedded data; ends with an HTML page.", "nnssl_demo -out demo")
    result.add_argument("-out", metavar="FOLDER", type=Path, default=Path("demo"), help="everything is written below it; a former demo there is replaced")
    result.add_argument("--phantom", action="store_true", help="procedural phantoms instead of real torso volumes; needs no download")
    return result


def main(argv: list[str] | None = None) -> int:
    return run(arguments(), _main, argv)


def _main(options: argparse.Namespace) -> int:
    from nnssl_ext.core.errors import UserError
    from nnssl_ext.evaluation.demo import FOLDERS, Demo

    present = {entry.name for entry in options.out.iterdir()} if options.out.is_dir() else set()
    if present and not present & set(FOLDERS):
        raise UserError("the folder is not empty and is no former demo", options.out, "name another one: nnssl_demo -out FOLDER")
    page = Demo(options.out, options.phantom).run()
    print(f"\ndone: open {page} in a browser")
    return 0
