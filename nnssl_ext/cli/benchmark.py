"""nnssl_benchmark: what pretraining is worth, from dataset IDs or from a suite's file, with seeds, baselines and a report."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_ext.cli.common import SOME_FAILED, at_least_one, parser, run
from nnssl_ext.cli.export import MODES
from nnssl_ext.core.errors import UserError

if TYPE_CHECKING:
    from nnssl_ext.benchmark.suite import Suite

LABELS = (2, 4, 8)
GRID = ("-tr", "-b", "-o", "-seeds", "-n", "-mode", "-schedule", "--quick")  # options that a suite stands for


def arguments() -> argparse.ArgumentParser:
    result = parser(
        "nnssl_benchmark",
        "Pretrain with several methods and seeds, fine-tune with few labels, judge frozen features, and compare all of it with training from scratch. "
        "What is finished is kept: an interrupted benchmark goes on, and a second run only prints.",
        "nnssl_benchmark 802 902 -tr MAETrainer DINOv2Trainer -b resenc primus -n 2 4 8 -mode full frozen -out benchmark",
    )
    result.add_argument("datasets", metavar="ID", nargs="*", help="unlabelled dataset in $nnssl_raw, then labelled ones in $nnUNet_raw; IDs or names")
    result.add_argument("--suite", metavar="FILE", type=Path, help="YAML file that says everything, in place of IDs; see benchmarks/learning/suite.yaml")
    result.add_argument("--full", action="store_true", help="with --suite: its full grid")
    result.add_argument("-out", metavar="FOLDER", type=Path, default=Path("benchmark"), help="data, records and report (default: %(default)s)")
    result.add_argument("-tr", metavar="TRAINER", nargs="+", default=["MAETrainer"], help="methods (default: MAETrainer)")
    result.add_argument("-b", metavar="FAMILY", nargs="+", help="backbone families, for each method that can use them (default: each method's own)")
    result.add_argument("-o", metavar="KEY=VALUE", nargs="+", default=[], help="hyper-parameters of all pretrainings that differ from the methods' defaults")
    result.add_argument("-seeds", metavar="N", type=at_least_one, default=3, help="of pretraining and fine-tuning (default: %(default)s)")
    help_labels = "numbers of labelled cases (default: those of 2, 4 and 8 that there are); smaller subsets lie within larger ones"
    result.add_argument("-n", metavar="N", nargs="+", type=at_least_one, help=help_labels)
    result.add_argument("-mode", nargs="+", choices=MODES, default=["full"], help="of fine-tuning, as of nnssl_finetune (default: full)")
    help_schedule = "of fine-tuning, as our nnU-Net trainers' names go on: 150ep for 150 epochs, short for a trial (default: 1000 epochs)"
    result.add_argument("-schedule", metavar="NAME", default="", help=help_schedule)
    help_quick = "fine-tune for a few hundred iterations in this process, for trials (default: by nnU-Net's own commands)"
    result.add_argument("--quick", action="store_true", help=help_quick)
    result.add_argument("-lanes", metavar="N", type=at_least_one, help="units at a time, of one thread each (default: 2 on the CPU, 1 with a card)")
    result.add_argument("-device", choices=("cpu", "cuda"), help="default: the CPU with quick fine-tuning, else cuda for jobs and where there is a card")
    help_slurm = "as jobs of a SLURM cluster, one for each pretraining and what follows it; settings of sbatch; the same command without it writes the report"
    result.add_argument("--slurm", metavar="KEY=VALUE", nargs="*", help=help_slurm)
    result.add_argument("--write-expected", metavar="FILE", type=Path, help="keep the numbers of this run, for --check")
    result.add_argument("--check", metavar="FILE", type=Path, help="compare the numbers with those of --write-expected")
    return result


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser_ = arguments()
    parser_.set_defaults(argv=argv)
    return run(parser_, _main, argv)


def _main(options: argparse.Namespace) -> int:
    import torch

    from nnssl_ext.benchmark import grid, lanes
    from nnssl_ext.benchmark.data import prepare
    from nnssl_ext.benchmark.report import write_report
    from nnssl_ext.benchmark.results import differences, expected, write_results
    from nnssl_ext.benchmark.runs import read_results
    from nnssl_ext.benchmark.summary import summarise, terminal_table
    from nnssl_ext.core.files import FolderLock, write_json

    suite = _suite(options)
    grid.check(suite, options.suite or "command line")
    suite = grid.with_families(suite)
    jobs = options.slurm is not None
    device = options.device or ("cuda" if suite.quick is None and (jobs or torch.cuda.is_available()) else "cpu")  # jobs find a card, if not this machine
    out, count = options.out.resolve(), options.lanes or (2 if device == "cpu" else 1)
    if not jobs and not (out / "units").is_dir():  # else all may be finished, by jobs on other machines
        _check_card(device)
    with FolderLock(out):
        data = prepare(suite, out, count)
        planned = grid.grid(suite, data, device)
        units = [one.unit for one in planned]
        left = lanes.estimate(units, out, count)
        if left and jobs:
            from nnssl_ext.cli.slurm import submit_chains

            words = [*_words(options), *([] if options.device else ["-device", device])]  # here the default may be another one
            return submit_chains(lanes.missing(units, out), out, options.slurm, device, words)
        if left:
            _check_card(device)
        print(f"{suite.name}: {len(units)} units; " + (f"to do: {left}" if left else "all of them are finished"), flush=True)
        failed = lanes.finish_all(units, out, count, say=lambda text: print(text, flush=True))
        results = write_results(planned, suite, out, shlex.join(["nnssl_benchmark", *_words(options)]))
    page = write_report(out)
    print(f"{terminal_table(summarise(read_results(out / 'results.json')))}\n\nresults: {out / 'results.json'}\nreport: {page}")
    if options.write_expected and not failed:
        write_json(options.write_expected, expected(results))
        print(f"expected numbers: {options.write_expected}")
    wrong = _check(*differences(results, options.check)) if options.check else False
    for text in failed:
        print(f"error: {text}", file=sys.stderr)
    return SOME_FAILED if failed or wrong else 0


def _check_card(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA card is available", "option -device", "use -device cpu, or check the driver with nvidia-smi")


def _check(lines: list[str], may_differ: bool) -> bool:
    """Say what differs from the expected numbers; whether that is an error."""
    print("\n".join(lines) if lines else "all numbers are the expected ones, to the digit")
    if lines and may_differ:
        print("numbers may differ on another machine, with other versions or threads")
    return bool(lines) and not may_differ


def _words(options: argparse.Namespace) -> list[str]:
    """The command line that prints the report again."""
    words, skip = list[str](), False
    for word in options.argv:
        skip = word in ("--slurm", "--check", "--write-expected") or (skip and not word.startswith("-"))
        words += [] if skip else [word]
    return words


def _suite(options: argparse.Namespace) -> Suite:
    """What the command line says.

    Raises:
        UserError: neither or both of IDs and --suite, no labelled dataset, a method that no family fits, mistakes in the file.
    """
    from nnssl_ext.benchmark.suite import Cells, Method, Suite, check_numbers, read_suite

    if options.suite is not None:
        if options.datasets:
            raise UserError("both dataset IDs and a suite are given", "command line", "give one of them")
        ignored = [name for word in options.argv if (name := word.partition("=")[0]) in GRID]
        if ignored:
            raise UserError(f"a suite says itself what {ignored[0]} would say", f"option {ignored[0]}", "write it into a copy of the suite")
        return read_suite(options.suite, options.full)
    if len(options.datasets) < 2:
        fix = "nnssl_benchmark 801 901, or nnssl_benchmark --suite benchmarks/learning/suite.yaml"
        raise UserError("an unlabelled and at least one labelled dataset are needed", "command line", fix)
    if options.full:
        raise UserError("--full belongs to --suite", "command line", "choose the grid with -seeds, -n and -mode")
    labels = tuple(options.n or _available(options.datasets[1:]))
    values = dict(_pair(text) for text in options.o)
    methods = tuple(Method(trainer, family, options=values) for trainer in dict.fromkeys(options.tr) for family in _families(trainer, options.b))
    cells = tuple(Cells(mode, labels) for mode in dict.fromkeys(options.mode))
    made = Suite("command line", methods, options.datasets[0], tuple(options.datasets[1:]), seeds=options.seeds, finetuning=cells, probe=labels)
    made = replace(made, quick={} if options.quick else None, schedule=options.schedule)
    check_numbers(made, "command line")
    return made


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise UserError(f"'{text}' is not of the form key=value", "option -o", "write for example -o epochs=100")
    return key, value


def _families(trainer: str, wanted: list[str] | None) -> list[str]:
    """The families that a method is trained with."""
    from nnssl_ext.benchmark.pretrain import trainer_class
    from nnssl_ext.core.errors import did_you_mean
    from nnssl_ext.nn.backbones.base import families

    cls, known = trainer_class(trainer), families()
    if wanted is None:
        return [cls.default_family]
    for name in wanted:
        if name not in known:
            raise UserError(f"there is no backbone family '{name}'", "option -b", did_you_mean(name, known))
    fitting = [name for name in dict.fromkeys(wanted) if any(need <= known[name].supports for need in cls.needs)]
    if not fitting:
        raise UserError(f"{trainer} can use none of {', '.join(wanted)}", "option -b", f"its own family is {cls.default_family}")
    for name in set(wanted) - set(fitting):
        print(f"{trainer} can't use {name}: left out")
    return fitting


def _available(labelled: list[str]) -> list[int]:
    """The usual numbers of labels, as far as all datasets have as many."""
    from nnssl_ext.core.paths import dataset_name, root
    from nnssl_ext.finetuning.plans import labelled_cases

    folders = [root("nnUNet_raw") / dataset_name(name, ("nnUNet_raw",)) for name in labelled]
    most = min((len(labelled_cases(folder)) for folder in folders if (folder / "dataset.json").is_file()), default=max(LABELS))
    return [count for count in LABELS if count <= most] or [most]


if __name__ == "__main__":
    sys.exit(main())
