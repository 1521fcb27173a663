"""``python -m benchmarks NAME [--quick]``: one benchmark, or "all"; the last line is one JSON object (a list for "all")."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from pathlib import Path

import torch

from benchmarks.common import THREADS
from nnssl_ext import __version__
from nnssl_ext.core.files import write_json

NAMES = (
    "resample",
    "preprocess",
    "fingerprint",
    "growth",
    "loader",
    "loader_augmented",
    "mae_primus",
    "mae_resenc",
    "dinov2_a",
    "dinov2_b",
    "methods",
    "cross_view",
    "startup",
    "known_warps",
    "registration",
)  # one module each, with run(quick) -> Result
RESULTS = Path(__file__).with_name("results.json")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=(*NAMES, "all"))
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and, where said, smaller work: to see that it runs, not to quote")
    options = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    results = []
    for name in NAMES if options.name == "all" else [options.name]:
        result = importlib.import_module(f"benchmarks.{name}").run(options.quick)
        print(result.sentence(), file=sys.stderr)
        results.append({"name": name, **result.as_dict()})
    if options.name == "all":
        machine = {"processor": platform.machine(), "threads": THREADS, "python": platform.python_version(), "torch": torch.__version__}
        write_json(RESULTS, {"nnssl_ext": __version__, "machine": machine, "quick": options.quick, "results": results})
        print(json.dumps(results))
    else:
        print(json.dumps(results[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
