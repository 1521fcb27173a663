"""nnU-Net plans with a pretrained topology: `$nnUNet_preprocessed/DatasetXXX_NAME/nnssl_METHOD_HASH8.json`."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnssl_ext.core.errors import UserError, did_you_mean
from nnssl_ext.core.files import read_json, sha256_json, write_json
from nnssl_ext.core.paths import root
from nnssl_ext.finetuning.networks import ADAPTER, FROZEN, FULL_RESOLUTION_STRIDES, LINEAR, MLP, PLANNED, FullResolution
from nnssl_ext.finetuning.pretrained import Pretrained

LIKE_PRETRAINED, OWN = "like_pretrained", "own"
FULL, ENCODER = "full", "encoder"
FREEZING = {"frozen": FROZEN, "adapter": ADAPTER, "mlp": MLP, "linear": LINEAR}
MODES = {FULL: PLANNED, ENCODER: PLANNED, **FREEZING}  # what a plan names in place of the library's networks
_KEY = "nnssl_finetuning"  # of a plan: what our trainers and the export read in it
_OWN_SPACING = ("noresample", "median")  # pretraining configurations without a spacing of their own: nnU-Net needs one, the dataset decides
_MIN_BATCH_SIZE = 2
_ROUNDING = 1e-9


@dataclass(frozen=True)
class PlanOptions:
    """What a user may choose about the nnU-Net plan.

    Args:
        configuration: name of nnU-Net's configuration, such as "3d_fullres"; "2d" for a network of slices.
        spacing: "like_pretrained" or "own" (nnU-Net's choice for the dataset), also for the axis across which slices lie.
        patch_size: voxels, (z, y, x), of slices along two axes; None takes the pretraining's, of slices whole ones, see `patch_and_batch`.
        batch_size: None takes the pretraining's, at least 2.
        mode: "full" hands over all that was pretrained, "encoder" only the encoder; the others don't train it, either, but a
            decoder: "frozen" the network's own one, "adapter" upsampling layers, "mlp" an all-MLP decoder, "linear" linear maps alone.
        cases: how many labelled cases of a fold are trained on: a number, or a fraction (float) of them; None takes all.
    """

    configuration: str = "3d_fullres"
    spacing: str = LIKE_PRETRAINED
    patch_size: tuple[int, ...] | None = None
    batch_size: int | None = None
    mode: str = FULL
    cases: int | float | None = None


def plans_name(pretrained: Pretrained, options: PlanOptions) -> str:
    """`nnssl_METHOD_HASH8`, with mode and cases where they are chosen: the same for the same checkpoint and options, another one for any other."""
    chosen = [options.configuration, options.spacing, None if options.patch_size is None else list(options.patch_size), options.batch_size]
    told = [options.mode] * (options.mode != FULL) + [f"{options.cases}cases"] * (options.cases is not None)
    return "_".join(["nnssl", pretrained.method, *told, sha256_json([pretrained.identity, chosen])[:8]])


def has_mode(network: str, mode: str) -> bool:
    """Whether a network of the library, by the dotted name of its class, can be fine-tuned in this mode: its freezing needs a class of ours."""
    return mode not in FREEZING or network.rpartition(".")[2] in MODES[mode]


def finetuning_options(plans: Mapping[str, Any]) -> tuple[str, int | float | None]:
    """Mode and labelled cases of the content of a plans file; those of a plan that is not ours are the defaults."""
    written = plans.get(_KEY, {})
    return written.get("mode", FULL), written.get("cases")


def write_plans(pretrained: Pretrained, dataset: str, options: PlanOptions) -> Path:
    """Write the plan of a checkpoint for a downstream dataset; nnU-Net's fingerprint of it must exist.

    Args:
        pretrained: the checkpoint.
        dataset: `DatasetXXX_NAME` in `$nnUNet_raw`.
        options: what the user chose.

    Returns:
        the plans file; `dataset.json` lies beside it, as nnU-Net expects.

    Raises:
        UserError: no fingerprint, a patch size that the network cannot take, a configuration of other axes than the network's, an impossible mode.
    """
    folder, raw = root("nnUNet_preprocessed") / dataset, root("nnUNet_raw") / dataset
    if not (folder / "dataset_fingerprint.json").is_file():
        raise UserError("the dataset has no nnU-Net fingerprint", folder, f"nnUNetv2_extract_fingerprint -d {dataset_number(dataset)}")
    check_configuration(pretrained, options.configuration)
    if options.mode not in MODES:
        raise UserError(f"there is no mode '{options.mode}'", "option -mode", did_you_mean(options.mode, MODES))
    if options.batch_size is not None and options.batch_size < 1:
        raise UserError(f"the batch size must be at least 1, not {options.batch_size}", "option -batch_size")
    pretrained.check_patch_size(options.patch_size or pretrained.patch_size)
    planner = ExperimentPlanner(dataset, plans_name=plans_name(pretrained, options))
    content = _plans(planner, pretrained, options)
    recursive_fix_for_json_export(content)
    shutil.copy(raw / "dataset.json", folder / "dataset.json")
    path = folder / f"{planner.plans_identifier}.json"
    write_json(path, content)
    return path


def default_configuration(pretrained: Pretrained) -> str:
    """nnU-Net's configuration that a checkpoint is for when nothing else is said."""
    return "3d_fullres" if pretrained.network.axes == 3 else "2d"


def check_configuration(pretrained: Pretrained, configuration: str) -> None:
    """Raise a `UserError` unless networks of this configuration of nnU-Net have as many axes as the pretrained one."""
    axes = 2 if configuration.startswith("2d") else 3
    if axes != pretrained.network.axes:
        what = f"a {pretrained.network.axes}D network was pretrained; nnU-Net's {configuration} configuration can't use it"
        raise UserError(what, "option -c", f"use -c {default_configuration(pretrained)}")


def dataset_number(dataset: str) -> int:
    """901 for "Dataset901_NAME"."""
    return int(dataset.removeprefix("Dataset").partition("_")[0])


def is_preprocessed(plans: Path, configuration: str) -> bool:
    """Whether every training case lies preprocessed in the folder that the plan names (it is shared between plans)."""
    content = read_json(plans)
    folder = plans.parent / content["configurations"][configuration]["data_identifier"]
    raw = root("nnUNet_raw") / content["dataset_name"]
    labels, ending = plans.parent / "gt_segmentations", read_json(raw / "dataset.json")["file_ending"]
    cases = labelled_cases(raw)
    return bool(cases) and all((folder / f"{case}.pkl").is_file() and (labels / f"{case}{ending}").is_file() for case in cases)


def labelled_cases(raw: Path) -> list[str]:
    """Identifiers of the training cases of a dataset in `$nnUNet_raw`, sorted."""
    description = read_json(raw / "dataset.json")
    ending: str = description["file_ending"]
    return sorted(description["dataset"] if "dataset" in description else (f.name.removesuffix(ending) for f in (raw / "labelsTr").glob(f"*{ending}")))


def _plans(planner: ExperimentPlanner, pretrained: Pretrained, options: PlanOptions) -> dict[str, Any]:
    fingerprint = planner.dataset_fingerprint
    spacings, shapes = np.array(fingerprint["spacings"]), np.array(fingerprint["shapes_after_crop"])
    schemes, use_mask = planner.determine_normalization_scheme_and_whether_mask_is_used_for_norm()
    intensities = {str(key): dict(value) for key, value in fingerprint["foreground_intensity_properties_per_channel"].items()}
    for index, (name, scheme) in enumerate(zip(_channel_names(planner.dataset_json), schemes, strict=True)):
        if scheme == "CTNormalization":
            intensities[str(index)].update(_ct_statistics(pretrained, name))
    order = _order(planner, pretrained, options.spacing)
    spacings, shapes = spacings[:, order], shapes[:, order]
    first = 3 - pretrained.network.axes  # axis of those that the network sees, after the transposition
    spacing = [float(s) for s in _spacing(planner, pretrained, options.spacing)[order][first:]]
    resampled = [compute_new_shape(s[first:], old[first:], spacing) for s, old in zip(shapes, spacings, strict=True)]
    patch, batch_size = patch_and_batch(pretrained, np.median(resampled, axis=0), options.patch_size)
    data, data_kwargs, labels, labels_kwargs = planner.determine_resampling()
    probabilities, probabilities_kwargs = planner.determine_segmentation_softmax_export_fn()
    reader = planner.determine_reader_writer().__name__
    ct = {index: intensities[str(index)] for index, scheme in enumerate(schemes) if scheme == "CTNormalization"}
    grid = [order, spacing] if first else spacing
    preprocessing = [grid, schemes, use_mask, ct, data.__name__, data_kwargs, labels.__name__, labels_kwargs, planner.preprocessor_name, reader]
    configuration = {
        "data_identifier": f"nnssl_{sha256_json(preprocessing)[:8]}",
        "preprocessor_name": planner.preprocessor_name,
        "batch_size": options.batch_size or batch_size,
        "patch_size": list(patch),
        "median_image_size_in_voxels": np.median(resampled, axis=0),
        "spacing": spacing,
        "normalization_schemes": schemes,
        "use_mask_for_norm": use_mask,
        "resampling_fn_data": data.__name__,
        "resampling_fn_seg": labels.__name__,
        "resampling_fn_data_kwargs": data_kwargs,
        "resampling_fn_seg_kwargs": labels_kwargs,
        "resampling_fn_probabilities": probabilities.__name__,
        "resampling_fn_probabilities_kwargs": probabilities_kwargs,
        "architecture": _architecture(pretrained, patch, options.mode),
        "batch_dice": bool(first),  # as nnU-Net: a slice often holds none of a class
    }
    return {
        "dataset_name": planner.dataset_name,
        "plans_name": planner.plans_identifier,
        "original_median_spacing_after_transp": [float(s) for s in np.median(spacings, axis=0)],
        "original_median_shape_after_transp": [int(round(s)) for s in np.median(shapes, axis=0)],
        "image_reader_writer": reader,
        "transpose_forward": order,
        "transpose_backward": [order.index(axis) for axis in range(3)],
        "configurations": {options.configuration: configuration},
        "experiment_planner_used": type(planner).__name__,
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": intensities,
        "nnssl_pretraining": {key: getattr(pretrained, key) for key in ("method", "family", "configuration", "identity")},
        _KEY: {"mode": options.mode, "cases": options.cases},
    }


def _order(planner: ExperimentPlanner, pretrained: Pretrained, policy: str) -> list[int]:
    """Axes after nnU-Net's transposition: in 3D as they are, since pretraining does not transpose; the axis across slices comes first."""
    axis = pretrained.config.slice_axis
    if axis is None:
        return [0, 1, 2]
    first = int(planner.determine_transpose()[0][0]) if policy == OWN else axis
    return [first, *(other for other in range(3) if other != first)]


def _spacing(planner: ExperimentPlanner, pretrained: Pretrained, policy: str) -> np.ndarray:
    """mm, (z, y, x)."""
    own = np.array(planner.determine_fullres_target_spacing(), float)
    if policy == OWN or pretrained.configuration in _OWN_SPACING:
        return own
    return np.array(pretrained.config.spacing_for(own.tolist()))


def patch_and_batch(pretrained: Pretrained, median: np.ndarray, wanted: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], int]:
    """Patch and batch size: those of the pretraining; in 2D whole slices, and as many pixels in a batch as in the pretraining.

    Args:
        pretrained: the checkpoint.
        median: voxels of the median case along the network's axes.
        wanted: the patch, where it is given.
    """
    patch, batch_size = wanted or pretrained.patch_size, pretrained.network.batch_size
    if pretrained.network.axes == 2:
        pixels, stride = batch_size * math.prod(pretrained.patch_size), np.array(pretrained.network.cell)
        edges = np.ceil(median / stride)
        shrunk = min(1.0, math.sqrt(pixels / (_MIN_BATCH_SIZE * float(np.prod(edges * stride)))))
        patch = wanted or tuple(int(edge) for edge in np.maximum(np.ceil(edges * shrunk - _ROUNDING), 2) * stride)
        batch_size = pixels // math.prod(patch)
    return patch, max(_MIN_BATCH_SIZE, batch_size)


def _channel_names(dataset_json: dict[str, Any]) -> list[str]:
    names = dataset_json["channel_names"] if "channel_names" in dataset_json else dataset_json["modality"]
    return [str(name) for name in names.values()]  # nnU-Net pairs channels with schemes in this order, too


def _ct_statistics(pretrained: Pretrained, channel: str) -> dict[str, float]:
    """Statistics of the pretraining's CT images under nnU-Net's names; empty when it saw no CT."""
    ct = {modality.casefold(): n for modality, n in pretrained.config.normalization.items() if n.scheme == "ct"}
    if not ct:
        return {}
    chosen = ct.get(channel.casefold(), next(iter(ct.values())))
    return {"mean": chosen.mean, "std": chosen.std, "percentile_00_5": chosen.low, "percentile_99_5": chosen.high}


def _architecture(pretrained: Pretrained, patch_size: Sequence[int], mode: str) -> dict[str, Any]:
    name, kwargs = pretrained.network.class_name, dict(pretrained.network.kwargs)
    short = name.rpartition(".")[2]
    if not has_mode(name, mode):
        others = [other for other in MODES if has_mode(name, other)]
        raise UserError(f"{short} has no -mode {mode}", "option -mode", f"use -mode {', '.join(others[:-1])} or {others[-1]}")
    planned = MODES[mode].get(short)
    if mode in FREEZING:
        kwargs["frozen"] = list(pretrained.encoder().modules)
    if planned is not None:
        name = f"{planned.__module__}.{planned.__name__}"
        if "patch_embed_size" in kwargs:
            kwargs["input_shape"] = list(patch_size)
        if issubclass(planned, FullResolution):
            if "strides" in kwargs:
                kwargs["encoder_strides"] = kwargs["strides"]
            kwargs["strides"] = [list(stride[: len(patch_size)]) for stride in FULL_RESOLUTION_STRIDES]
    return {"network_class_name": name, "arch_kwargs": kwargs, "_kw_requires_import": list(pretrained.network.imports)}
