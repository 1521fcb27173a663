"""What is each pretraining method worth on procedural phantoms, in minutes on a CPU?

``python -m benchmarks.learning --out FOLDER``: every method is pretrained on 200 unlabelled volumes, its frozen features are judged by
patch k-NN, and it is fine-tuned by nnU-Net with two labelled volumes, beside training from scratch with the same seed. What is finished
is kept in the folder: an interrupted study goes on, and a second run only prints. The tables are FOLDER/learning.md and learning.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.common import PAIRED
from benchmarks.learning.data import Data
from benchmarks.learning.report import rows, table
from benchmarks.learning.study import baseline, trial
from benchmarks.learning.suite import SUITE
from benchmarks.methods import methods
from nnssl_ext.benchmark.lanes import finish_all
from nnssl_ext.benchmark.units import environment
from nnssl_ext.core.errors import UserError, did_you_mean
from nnssl_ext.core.files import FolderLock, write_json, write_text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.learning", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of data, records and tables")
    parser.add_argument("--methods", nargs="+", metavar="NAME", default=None, help="trainers; default: all of the suite")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lanes", type=int, default=2, help="processes, of one thread each")
    options = parser.parse_args(argv)
    try:
        return study(options.out.resolve(), options.methods, options.seeds, options.lanes)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def study(out: Path, chosen: list[str] | None, seeds: list[int], lanes: int) -> int:
    """Finish what is missing and write the tables.

    Raises:
        UserError: a method that the suite doesn't have.
    """
    known = {entry.method for entry in SUITE}
    for name in chosen or ():
        if name not in known:
            raise UserError(f"the learning suite has no method '{name}'", "option --methods", did_you_mean(name, known))
    entries = [entry for entry in SUITE if entry.method in (chosen or methods())]
    with FolderLock(out):
        data = Data(out)
        data.prepare(lanes)
        digest = data.digest()
        baselines = [baseline(family, seeds, digest) for family in dict.fromkeys(entry.family for entry in entries)]
        pairs = data.prepare_pairs(lanes) if any(entry.method in PAIRED for entry in entries) else None
        trials = [trial(entry, seeds, digest, pairs) for entry in entries]
        errors = finish_all([unit for part in (*baselines, *trials) for chain in part.chains() for unit in chain], out, lanes)
        found = rows(baselines, trials, out)
        write_json(out / "learning.json", {**environment(), "data": digest, "seeds": seeds, "rows": found})
        write_text(out / "learning.md", table(found))
    print(table(found))
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
