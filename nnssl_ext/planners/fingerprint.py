"""What a dataset is like: spacings, shapes, body boxes, intensities; one pass over every file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext import __version__
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import FolderLock, write_json
from nnssl_ext.core.paths import preprocessed_folder, raw_folder
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.io.index import MASKS, Case, read_index
from nnssl_ext.io.readers import read_case
from nnssl_ext.preprocessing.crop import body_mask, bounding_box
from nnssl_ext.preprocessing.parallel import Workers, run_all

SCHEMA_VERSION = 1
SAMPLES = 10_000  # body voxels drawn from each channel of a case


def extract_fingerprint(dataset_name: str, workers: Workers) -> dict[str, Any]:
    """Read every case of a dataset and write `dataset_fingerprint.json` to its preprocessed folder.

    Args:
        dataset_name: `DatasetXXX_NAME`.
        workers: who does the work.

    Returns:
        the fingerprint: `cases` (shape and spacing (z, y, x) in voxels and mm, body box, modalities), `intensities` of the
        body by modality, `failed` (message by case).

    Raises:
        UserError: unreadable index, or not a single readable case.
    """
    cases = read_index(raw_folder(dataset_name))
    folder = preprocessed_folder(dataset_name)
    with FolderLock(folder):
        found, failed = run_all(_describe, cases, [case.identifier for case in cases], workers, f"fingerprint of {dataset_name}")
        if not found:
            first = next(iter(failed.items()))
            raise UserError(f"no case of {dataset_name} could be read; {first[0]}: {first[1].splitlines()[0]}", raw_folder(dataset_name), "mend the files")
        fingerprint = {
            "schema_version": SCHEMA_VERSION,
            "dataset_name": dataset_name,
            "nnssl_ext_version": __version__,
            "channels": len(cases[0].images),
            "cases": {name: found[name]["case"] for name in sorted(found)},
            "intensities": _pooled([found[name] for name in sorted(found)]),
            "failed": dict(sorted(failed.items())),
        }
        write_json(folder / "dataset_fingerprint.json", fingerprint)
        write_json(folder / "pretrain_data.json", _index(dataset_name, cases))
    return fingerprint


def _describe(case: Case) -> dict[str, Any]:
    array, geometry = read_case(case)
    masks = [body_mask(channel, modality) for channel, modality in zip(array, case.modalities)]
    box = bounding_box(np.any(masks, axis=0))
    samples = []
    for channel, (volume, mask) in enumerate(zip(array, masks)):
        inside = volume[mask] if mask.any() else volume.ravel()
        rng = sample_rng(0, channel, f"fingerprint {case.identifier}")  # a case's voxels don't depend on the other cases
        samples.append(inside if len(inside) <= SAMPLES else inside[rng.integers(0, len(inside), SAMPLES)])
    description = {
        "subject": case.subject,
        "modalities": list(case.modalities),
        **geometry.as_dict(),
        "body_box": [list(edge) for edge in box],
        "shape_after_crop": [high - low for low, high in box],
        "file_bytes": sum(path.stat().st_size for path in case.images),
    }
    return {"case": description, "samples": samples}


def _pooled(found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    by_modality: dict[str, list[np.ndarray]] = {}
    for entry in found:
        for modality, values in zip(entry["case"]["modalities"], entry["samples"]):
            by_modality.setdefault(modality, []).append(values)
    return {modality: _statistics(np.concatenate(parts).astype(np.float64)) for modality, parts in sorted(by_modality.items())}


def _statistics(values: np.ndarray) -> dict[str, float]:
    low, median, high = (float(v) for v in np.percentile(values, (0.5, 50, 99.5)))
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "median": median,
        "min": float(values.min()),
        "max": float(values.max()),
        "percentile_00_5": low,
        "percentile_99_5": high,
        "voxels": len(values),
    }


def _index(dataset_name: str, cases: list[Case]) -> dict[str, Any]:
    """The cases in nnssl's schema, whatever index they came from; nothing about the patients."""
    subjects: dict[str, Any] = {}
    for case in cases:
        subject = subjects.setdefault(case.subject, {"subject_id": case.subject, "subject_info": {}, "sessions": {}})
        session = subject["sessions"].setdefault(case.session, {"session_id": case.session, "session_info": {}, "images": []})
        found = {key: getattr(case, key) for key in MASKS}
        masks = {key: _portable(mask) if mask else None for key, mask in found.items()} if any(found.values()) else None
        for path, modality in zip(case.images, case.modalities):
            session["images"].append({"name": path.name, "modality": modality, "image_path": _portable(path), "image_info": {}, "associated_masks": masks})
    number = dataset_name.removeprefix("Dataset").partition("_")[0]
    datasets = {number: {"dataset_index": number, "name": dataset_name, "dataset_info": {}, "subjects": subjects}}
    return {"collection_index": int(number), "collection_name": dataset_name, "datasets": datasets}


def _portable(path: Path) -> str:
    folder = raw_folder("").resolve()
    resolved = path.resolve()
    return f"$nnssl_raw/{resolved.relative_to(folder).as_posix()}" if resolved.is_relative_to(folder) else str(path)
