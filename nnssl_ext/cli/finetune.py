"""`nnssl_finetune`: export, preprocess, train, predict and evaluate with stock nnU-Net."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nnssl_ext.cli import common
from nnssl_ext.cli.export import add_handoff_options, default_device, hand_off


def _main(options: argparse.Namespace) -> None:
    handoff = hand_off(options, options.tr, options.f)
    from nnssl_ext.finetuning.commands import Machine, finetune, next_commands

    machine = Machine(options.device or default_device(), options.num_gpus, options.np)
    if options.plan_only:
        print("\nnext:\n" + next_commands(handoff, machine, options.f))
    else:
        finetune(handoff, machine, options.f, options.continue_training)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = common.parser(
        "nnssl_finetune",
        "Fine-tune a checkpoint with nnU-Net: export, preprocess, train, then predict and evaluate imagesTs.",
        "nnssl_finetune -ckpt checkpoint_final.pth -d 901 -f 0",
    )
    add_handoff_options(arguments)
    arguments.add_argument("-f", default="0", choices=("0", "1", "2", "3", "4", "all"), help="fold (default: %(default)s)")
    arguments.add_argument(
        "-tr", metavar="TRAINER", help="nnU-Net trainer (default: nnsslResEncTrainer, nnsslPrimusTrainer or nnsslSegFormerTrainer; add _150ep or _short)"
    )
    arguments.add_argument("-device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    arguments.add_argument("-num_gpus", type=common.at_least_one, default=1, metavar="N", help="graphics cards for the training (default: %(default)s)")
    arguments.add_argument("--plan_only", action="store_true", help="write plan and weights, print the commands, run nothing more")
    arguments.add_argument("--c", action="store_true", dest="continue_training", help="continue a training that was stopped")
    return common.run(arguments, _main, argv)


if __name__ == "__main__":
    sys.exit(main())
