"""nnssl_train: pretrain a backbone on a preprocessed dataset."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

from nnssl_ext.cli.common import at_least_one, parser, run
from nnssl_ext.core.errors import UserError

if TYPE_CHECKING:
    from nnssl_ext.trainers.launch import ProbeMaker, Run


def arguments() -> argparse.ArgumentParser:
    result = parser(
        "nnssl_train", "Pretrain a backbone on the preprocessed cases of a dataset.", "nnssl_train 801 3d_fullres -tr MAETrainer -o epochs=100 lr=1e-3"
    )
    result.add_argument("dataset", help="dataset ID or name")
    result.add_argument("configuration", help="configuration of the plan, such as 3d_fullres")
    result.add_argument("-tr", metavar="TRAINER", nargs="+", default=["MAETrainer"], help="method (default: MAETrainer); with --slurm also several")
    result.add_argument("-b", metavar="FAMILY", help="backbone family: resenc, primus, primus_v2 or segformer3d (default: the method's own)")
    result.add_argument("-p", metavar="PLANS", default="nnsslPlans", help="name of the plans (default: %(default)s)")
    result.add_argument("-o", metavar="KEY=VALUE", nargs="+", default=[], help="hyper-parameters that differ from the method's defaults")
    help_init = (
        "start from the weights of an earlier checkpoint (file, shared folder or hf://owner/name): all where the method is the same, else the backbone's"
    )
    result.add_argument("-init", metavar="CHECKPOINT", help=help_init)
    result.add_argument("-device", choices=("cpu", "cuda"), help="default: cuda where there is a card")
    result.add_argument("-num_gpus", type=at_least_one, default=1, metavar="N", help="processes, one per card (default: 1)")
    result.add_argument("-probe", metavar="DATASET", help="labelled dataset (nnU-Net's raw format) on which the frozen features are tested now and then")
    help_slurm = "train as jobs of a SLURM cluster, which go on after preemption and time limits; settings of sbatch, such as partition=gpu time=2-00:00:00"
    result.add_argument("--slurm", metavar="KEY=VALUE", nargs="*", help=help_slurm)
    result.add_argument("-seeds", metavar="SEED", type=int, nargs="+", help="with --slurm: a job for each trainer and seed")
    result.add_argument("--c", action="store_true", help="continue from checkpoint_latest")
    result.add_argument(
        "--replay", type=int, nargs="?", const=-1, metavar="STEP", help="repeat a captured step that was not finite, and find where that begins"
    )
    result.add_argument("--val", action="store_true", help="only compute the validation losses of checkpoint_best")
    return result


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser_ = arguments()
    parser_.set_defaults(argv=argv)
    return run(parser_, _main, argv)


def _main(options: argparse.Namespace) -> int:
    if options.slurm is not None:
        from nnssl_ext.cli.slurm import submit

        return submit(options)
    if len(options.tr) > 1 or options.seeds is not None:
        raise UserError("several trainings at once are jobs of a cluster", "options -tr and -seeds", "add --slurm, or train one after the other (-o seed=1)")
    from nnssl_ext.trainers.launch import start

    chosen, probe = run_of(options)
    return start(chosen, options.num_gpus if options.replay is None else 1, [sys.executable, "-m", "nnssl_ext.cli.train", *options.argv], probe)


def run_of(options: argparse.Namespace) -> tuple[Run, ProbeMaker | None]:
    """What the command line says to train, and how to probe it."""
    from nnssl_ext.trainers.launch import Run

    probe = None
    if options.probe is not None:
        from nnssl_ext.evaluation.probe import find_probe

        probe = partial(find_probe, options.probe)
    (trainer,) = options.tr
    how = {"resume": options.c, "validate_only": options.val, "replay": options.replay, "init": options.init}
    return Run(options.dataset, options.configuration, trainer, options.p, options.b, tuple(options.o), options.device, **how), probe


if __name__ == "__main__":
    code = main()
    if "RANK" in os.environ:  # one of several that were started together; a job of a cluster calls `main`, and goes on after it
        from nnssl_ext.nn.distributed import leave

        leave(code)
    sys.exit(code)
