"""nnssl_cluster: clusters of the voxels of a preprocessed dataset, by the features of a pretrained backbone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_ext.cli.common import CHECKPOINT_HELP, SOME_FAILED, add_device, at_least_one, chosen_device, parser, run
from nnssl_ext.core.errors import UserError

if TYPE_CHECKING:
    from nnssl_ext.evaluation.features import Extractor
    from nnssl_ext.finetuning.pretrained import Pretrained
    from nnssl_ext.preprocessing.store import CaseStore

UPSAMPLING = ("trilinear", "bilateral")


def arguments() -> argparse.ArgumentParser:
    result = parser(
        "nnssl_cluster",
        "Cluster the voxels of a preprocessed dataset by the features of a pretrained backbone; PixelClusterTrainer learns to tell the clusters.",
        "nnssl_cluster fit 801 3d_fullres -ckpt checkpoint_final.pth -k 10\n  nnssl_cluster assign 801 3d_fullres",
    )
    result.add_argument(
        "action", choices=("fit", "assign"), help="fit: find the clusters; assign: write each voxel's cluster, for cases that have none of these"
    )
    result.add_argument("dataset", help="dataset ID or name")
    result.add_argument("configuration", help="configuration of the plan, such as 3d_fullres")
    result.add_argument("-ckpt", metavar="CHECKPOINT", type=Path, help=CHECKPOINT_HELP + "; needed to fit (default when assigning: where it was then)")
    result.add_argument("-k", metavar="K", type=at_least_one, help="fit: number of clusters (default: 10)")
    result.add_argument("-upsampling", choices=UPSAMPLING, help="fit: how features of cells become those of voxels (default: trilinear)")
    result.add_argument("-p", metavar="PLANS", default="nnsslPlans", help="name of the plans (default: %(default)s)")
    add_device(result)
    return result


def main(argv: list[str] | None = None) -> int:
    return run(arguments(), _main, argv)


def _main(options: argparse.Namespace) -> int:
    from nnssl_ext.core.paths import PREPROCESSED, dataset_name, preprocessed_folder
    from nnssl_ext.core.plan import Plan
    from nnssl_ext.preprocessing.store import CaseStore

    if options.action == "fit" and options.ckpt is None:
        raise UserError("whose features are to be clustered?", "option -ckpt", "give a checkpoint of nnssl_train, such as one of MAETrainer")
    given = [f"-{name}" for name in ("k", "upsampling") if getattr(options, name) is not None]
    if options.action == "assign" and given:
        raise UserError(f"{given[0]} belongs to the model that was fitted", f"option {given[0]}", "give it to nnssl_cluster fit")
    name = dataset_name(options.dataset, (PREPROCESSED,))
    file = preprocessed_folder(name) / f"{options.p}.json"
    if not file.is_file():
        raise UserError(f"dataset {name} has no plans '{options.p}'", file, f"nnssl_plan_and_preprocess -d {options.dataset}")
    config = Plan.load(file).configuration(options.configuration)
    store = CaseStore(preprocessed_folder(name) / config.data_identifier)
    return _fit(options, store) if options.action == "fit" else _assign(options, store, config.patch_size)


def _fit(options: argparse.Namespace, store: CaseStore) -> int:
    from nnssl_ext.core.files import FolderLock
    from nnssl_ext.evaluation.clusters import fit
    from nnssl_ext.preprocessing.clusters import FOLDER, MODEL

    pretrained, folder = _pretrained(options.ckpt), store.folder / FOLDER
    with FolderLock(folder):
        extractor = _extractor(pretrained, options)
        model = fit(store, extractor, pretrained.identity, options.k or 10, options.upsampling or UPSAMPLING[0], scratch=folder)
        model.save(folder / MODEL, pretrained.path)
    made, components = model.settings, model.components.explained
    print(f"{made['voxels']} voxels of {made['cases']} cases; {len(components)} components explain {components.sum():.1%} of the features' variance")
    print(f"{len(model.centres)} clusters with {', '.join(f'{share:.1%}' for share in made['shares'])} of the voxels: {folder / MODEL}")
    print(f"now: nnssl_cluster assign {options.dataset} {options.configuration}")
    return 0


def _assign(options: argparse.Namespace, store: CaseStore, patch_size: tuple[int, ...]) -> int:
    from nnssl_ext.evaluation.clusters import ClusterModel, assign
    from nnssl_ext.preprocessing.clusters import FOLDER, MODEL

    model, path = ClusterModel.load(store.folder / FOLDER / MODEL)
    pretrained = _pretrained(options.ckpt or path)
    if pretrained.identity != model.settings["checkpoint"]:
        raise UserError("the clusters were fitted to the features of another backbone", pretrained.path, "give its checkpoint (-ckpt), or fit again")
    extractor = _extractor(pretrained, options, tuple(model.settings["window"]), model.settings["overlap"])
    failed = assign(store, model, extractor, store.folder / FOLDER, patch_size)
    print(f"labels and pictures: {store.folder / FOLDER}")
    return SOME_FAILED if failed else 0


def _pretrained(path: Path) -> Pretrained:
    from nnssl_ext.finetuning.pretrained import Pretrained

    return Pretrained.load(path)


def _extractor(pretrained: Pretrained, options: argparse.Namespace, window: tuple[int, ...] | None = None, overlap: float = 0.5) -> Extractor:
    from nnssl_ext.evaluation.features import Extractor

    return Extractor.load(pretrained, window, overlap, device=chosen_device(options))


if __name__ == "__main__":
    sys.exit(main())
