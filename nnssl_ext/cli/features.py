"""nnssl_features: dense features of volumes from a pretrained backbone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nnssl_ext.cli.common import CHECKPOINT_HELP, SOME_FAILED, add_device, at_least_one, chosen_device, parser, run


def arguments() -> argparse.ArgumentParser:
    result = parser(
        "nnssl_features",
        "Write the dense features that a pretrained backbone gives of volumes, and pictures of them.",
        "nnssl_features -ckpt checkpoint_final.pth -i imagesTs -o features -pca 3 -format nifti",
    )
    result.add_argument("-ckpt", metavar="CHECKPOINT", type=Path, required=True, help=CHECKPOINT_HELP)
    help_images = "images, folders of images, raw dataset folders, or imagesTs/CASE for imagesTs/CASE_0000.nii.gz, imagesTs/CASE_0001.nii.gz, ..."
    result.add_argument("-i", metavar="IMAGES", type=Path, nargs="+", required=True, help=help_images)
    result.add_argument("-o", metavar="FOLDER", type=Path, required=True, help="where the features are written")
    result.add_argument("-size", metavar=("Z", "Y", "X"), nargs=3, type=at_least_one, help="voxels that the backbone sees at once (default: the plan's patch)")
    result.add_argument("-overlap", metavar="F", type=float, default=0.5, help="share of a window's edge that the next one sees again (default: %(default)s)")
    result.add_argument("-zoom", metavar="F", type=float, default=1.0, help="enlarge volumes first, for cells that are finer in mm (default: %(default)s)")
    result.add_argument("-format", choices=("npz", "nifti"), default="npz", help="of the files (default: %(default)s)")
    help_pca = "write N principal components, fitted to the bodies of all images together, instead of all features"
    result.add_argument("-pca", metavar="N", type=at_least_one, help=help_pca)
    help_dtype = "number format of features in npz files; components and NIfTI are float32 (default: %(default)s)"
    result.add_argument("-dtype", choices=("float16", "float32"), default="float16", help=help_dtype)
    result.add_argument("-modality", metavar="M", nargs="+", default=[], help="modality of each channel, where the plan knows several and no index tells")
    add_device(result)
    return result


def main(argv: list[str] | None = None) -> int:
    return run(arguments(), _main, argv)


def _main(options: argparse.Namespace) -> int:
    from nnssl_ext.evaluation.feature_files import FeatureWriter, find_cases
    from nnssl_ext.evaluation.features import Extractor
    from nnssl_ext.finetuning.pretrained import Pretrained

    device = chosen_device(options)
    pretrained = Pretrained.load(options.ckpt)
    cases = find_cases(options.i, pretrained, options.modality)
    extractor = Extractor.load(pretrained, options.size and tuple(options.size), options.overlap, options.zoom, device)
    writer = FeatureWriter(pretrained, extractor, options.o, options.format, options.pca, options.dtype)
    return SOME_FAILED if writer.run(cases) else 0


if __name__ == "__main__":
    sys.exit(main())
