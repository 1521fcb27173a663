"""nnssl_evaluate_registration: how well images are registered by the features of a pretrained backbone, without any training for it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nnssl_ext.cli.common import CHECKPOINT_HELP, SOME_FAILED, at_least_one, parser, run

FEATURES = ("mind", "intensity", "random", "checkpoint", "precomputed")
PRESETS = ("dinoreg", "medssl", "mind_default")


def arguments() -> argparse.ArgumentParser:
    result = parser(
        "nnssl_evaluate_registration",
        "Register pairs of images by the features of a pretrained backbone, and by others for comparison; nothing is trained for it.",
        "nnssl_evaluate_registration -ckpt checkpoint_final.pth -pairs pairs.json -out registration",
    )
    result.add_argument("-pairs", metavar="JSON", type=Path, required=True, help='list of pairs: [{"fixed": "a.nii.gz", "moving": "b.nii.gz", ...}, ...]')
    result.add_argument("-out", metavar="FOLDER", type=Path, required=True, help="where everything is written")
    result.add_argument("-ckpt", metavar="CHECKPOINT", type=Path, help=CHECKPOINT_HELP)
    help_features = "which ones (default: mind intensity, and with a checkpoint random checkpoint): random is the checkpoint's network before any training"
    result.add_argument("--features", choices=FEATURES, nargs="+", help=help_features)
    help_preset = "how all features but mind are registered; mind always has mind_default (default: %(default)s)"
    result.add_argument("-preset", choices=PRESETS, default="dinoreg", help=help_preset)
    result.add_argument("-iterations", metavar="N", type=at_least_one, help="of the instance optimisation (default: the presets')")
    result.add_argument("-spacing", metavar="MM", type=float, help="register at this spacing (default: that of the fixed image)")
    result.add_argument("-size", metavar=("Z", "Y", "X"), nargs=3, type=at_least_one, help="voxels that the backbone sees at once (default: the plan's patch)")
    result.add_argument("-overlap", metavar="F", type=float, default=0.5, help="share of a window's edge that the next one sees again (default: %(default)s)")
    result.add_argument("-zoom", metavar="F", type=float, default=1.0, help="enlarge volumes first, for cells that are finer in mm (default: %(default)s)")
    result.add_argument("-device", choices=("cpu", "cuda"), help="default: cuda where there is a card")
    return result


def main(argv: list[str] | None = None) -> int:
    return run(arguments(), _main, argv)


def _main(options: argparse.Namespace) -> int:
    from dataclasses import replace

    import torch

    from nnssl_ext.core.errors import UserError
    from nnssl_ext.evaluation.registration import PRESETS as SETTINGS
    from nnssl_ext.evaluation.registration_features import LEARNED, Describer
    from nnssl_ext.evaluation.registration_files import RegistrationRun, table
    from nnssl_ext.evaluation.registration_pairs import read_pairs
    from nnssl_ext.finetuning.pretrained import Pretrained

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA card is available", "option -device", "use -device cpu, or check the driver with nvidia-smi")
    kinds = tuple(dict.fromkeys(options.features or ("mind", "intensity", *(LEARNED if options.ckpt else ()))))
    if options.ckpt is None and set(kinds) & set(LEARNED):
        raise UserError(f"'{(set(kinds) & set(LEARNED)).pop()}' needs the network of a checkpoint", "option --features", "give one with -ckpt")
    if options.spacing is not None and not options.spacing > 0:
        raise UserError(f"a spacing of {options.spacing:g} mm is impossible", "option -spacing", "give a positive number")
    pairs, pretrained = read_pairs(options.pairs), options.ckpt and Pretrained.load(options.ckpt)
    settings, mind = (
        SETTINGS[name] if options.iterations is None else replace(SETTINGS[name], iterations=options.iterations) for name in (options.preset, "mind_default")
    )
    describe = Describer(pretrained, options.size and tuple(options.size), options.overlap, options.zoom, device)
    means, failed = RegistrationRun(describe, kinds, options.out, settings, mind, options.spacing).run(pairs)
    print(table(means))
    print(f"fields, images and tables: {options.out}")
    return SOME_FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
