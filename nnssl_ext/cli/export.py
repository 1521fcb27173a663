"""`nnssl_export`: an nnU-Net plan and a weights file for a downstream dataset, or a model to be shared."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_ext.cli import common
from nnssl_ext.core.errors import UserError

if TYPE_CHECKING:
    from nnssl_ext.finetuning.commands import Handoff


MODES = ("full", "encoder", "frozen", "adapter", "mlp", "linear")


def add_handoff_options(arguments: argparse.ArgumentParser, dataset: bool = True) -> None:
    """Options that `nnssl_export` and `nnssl_finetune` share; whether the dataset has to be given."""
    arguments.add_argument("-ckpt", required=True, type=Path, metavar="CHECKPOINT", help=common.CHECKPOINT_HELP)
    arguments.add_argument("-d", required=dataset, metavar="ID", help="downstream dataset in $nnUNet_raw: ID or name")
    arguments.add_argument("-c", metavar="CONFIGURATION", help="nnU-Net configuration to write (default: 3d_fullres; 2d for a network of slices)")
    arguments.add_argument("-out", type=Path, metavar="FOLDER", help="folder of the weights file (default: beside the plan in $nnUNet_preprocessed)")
    arguments.add_argument("-spacing", choices=("like_pretrained", "own"), default="like_pretrained", help="spacing of the plan (default: %(default)s)")
    help_patch = "voxels along Z Y X, of slices along their two axes (default: the pretraining's; whole slices)"
    arguments.add_argument("-patch_size", nargs="+", type=common.at_least_one, metavar="N", help=help_patch)
    arguments.add_argument("-batch_size", type=common.at_least_one, metavar="N", help="default: the pretraining's, at least 2")
    help_mode = (
        "full hands over all that was pretrained, encoder only the encoder; the others leave that untrained under the network's own decoder (frozen), "
        "upsampling layers (adapter; Primus), an all-MLP decoder (mlp) or linear maps of its features (linear)"
    )
    arguments.add_argument("-mode", choices=MODES, default="full", help=help_mode + " (default: %(default)s)")
    cases = arguments.add_mutually_exclusive_group()
    help_n = "train on N of the fold's labelled cases; fewer always lie within more (default: all)"
    cases.add_argument("-n", type=common.at_least_one, metavar="N", dest="cases", help=help_n)
    cases.add_argument("-ratio", type=_share, metavar="R", dest="cases", help="the same as a fraction of them, such as 0.1")
    arguments.add_argument("-np", type=common.at_least_one, default=4, metavar="N", help="worker processes of nnU-Net (default: %(default)s)")


def _share(text: str) -> float:
    """A fraction above 0, up to 1, of an option."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a fraction above 0, up to 1")
    return value


def hand_off(options: argparse.Namespace, trainer: str | None, fold: str = "0") -> Handoff:
    """Plan and weights as the shared options say; without `trainer` our own for the backbone family."""
    from nnssl_ext.finetuning import commands
    from nnssl_ext.finetuning.plans import PlanOptions, default_configuration
    from nnssl_ext.finetuning.pretrained import Pretrained
    from nnssl_ext.finetuning.trainers import DEFAULT_TRAINERS

    dataset = commands.downstream_dataset(options.d)
    pretrained = Pretrained.load(options.ckpt)
    patch_size = None if options.patch_size is None else tuple(options.patch_size)
    chosen = PlanOptions(options.c or default_configuration(pretrained), options.spacing, patch_size, options.batch_size, options.mode, options.cases)
    handoff = commands.hand_off(pretrained, dataset, chosen, trainer or DEFAULT_TRAINERS[pretrained.family], options.out, options.np, fold)
    print(f"plan:    {handoff.plans}\nweights: {handoff.weights}\n{handoff.report}")
    return handoff


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _main(options: argparse.Namespace) -> None:
    if options.hub is None and options.d is None:
        raise UserError("what is to be written?", "command line", "give a dataset for nnU-Net (-d 901), or share the model (--hub FOLDER)")
    if options.hub is not None:
        from nnssl_ext.finetuning.hub import UNKNOWN, share

        print(f"shared:  {share(options.ckpt, options.hub, options.license or UNKNOWN, options.heads, options.pictures)}")
        if options.license is None:
            print("warning: the model card says that the licence is unknown; name one with --license")
    if options.d is not None:
        _hand_off(options)


def _hand_off(options: argparse.Namespace) -> None:
    handoff = hand_off(options, options.tr)
    from nnssl_ext.finetuning.commands import Machine, next_commands

    print("\nnext:\n" + next_commands(handoff, Machine(default_device(), processes=options.np)))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = common.parser(
        "nnssl_export",
        "Write the nnU-Net plan and the weights with which nnU-Net fine-tunes a checkpoint, or a model to be shared.",
        "nnssl_export -ckpt checkpoint_final.pth -d 901\n  nnssl_export -ckpt checkpoint_final.pth --hub hf://owner/name --license cc-by-4.0",
    )
    add_handoff_options(arguments, dataset=False)
    help_hub = "share the model, with its card: a folder, or hf://owner/name to upload it (private until you publish it there)"
    arguments.add_argument("--hub", metavar="TARGET", help=help_hub)
    arguments.add_argument("--license", metavar="ID", help="for --hub: licence of the weights, such as cc-by-4.0 (default: unknown)")
    arguments.add_argument("--heads", action="store_true", help="for --hub: also heads and teacher, so that -init goes on with the same method as a whole")
    arguments.add_argument("--pictures", action="store_true", help="for --hub: also the run's last picture, which shows training images")
    arguments.add_argument("-tr", default="nnUNetTrainer", metavar="TRAINER", help="nnU-Net trainer that will take the weights (default: %(default)s)")
    return common.run(arguments, _main, argv)


if __name__ == "__main__":
    sys.exit(main())
