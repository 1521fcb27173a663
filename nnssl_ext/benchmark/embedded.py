"""The data of the embedded suite: procedural phantoms to pretrain with, to fine-tune with, with lesions to tell apart, and in pairs to register."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.benchmark.suite import Generator
from nnssl_ext.core.files import write_text
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.evaluation.demo_data import Job, phantom_geometry, rounded, write_dataset, write_dataset_802, write_dataset_902
from nnssl_ext.evaluation.phantom import PhantomPair, make_pair, make_phantom

PHANTOM_TASKS = "Dataset904_PhantomTasks"
CLASSES, PAIRS, IMAGES = "classification.csv", "pairs.json", "images"
_FIRST_LESION, _FIRST_PAIR = 400_000, 500_000  # indices of subjects that no other data set has
_MAX_MM = 18.0  # longest displacement of a pair
_KINDS = ("benign", "malignant")


def write_embedded(nnssl_raw: Path, nnunet_raw: Path, wanted: Generator, workers: int) -> tuple[str, tuple[str, ...]]:
    """Write whatever is missing; names of the unlabelled and of the labelled data sets."""
    size, spacing = wanted.size, wanted.spacing
    unlabelled = write_dataset_802(nnssl_raw, wanted.unlabelled, size=size, spacing=spacing, workers=workers, modalities=("CT",))
    labelled = write_dataset_902(nnunet_raw, wanted.labelled, wanted.test, size=size, spacing=spacing, workers=workers)
    tasks = (write_tasks(nnunet_raw, wanted, workers),) if wanted.lesions or wanted.pairs else ()
    return str(unlabelled["name"]), (str(labelled["name"]), *tasks)


def write_tasks(nnunet_raw: Path, wanted: Generator, workers: int) -> str:
    """Lesions of two kinds, of the same sizes and means, with classification.csv; pairs with known fields and landmarks, with pairs.json."""
    folder, shape, spacing = nnunet_raw / PHANTOM_TASKS, (wanted.size,) * 3, (wanted.spacing,) * 3
    kinds = {f"lesion{number:03d}": _KINDS[number % 2] for number in range(wanted.lesions)}
    jobs: list[Job] = []
    for number, (name, kind) in enumerate(kinds.items()):

        def lesion(number: int = number, kind: str = kind) -> tuple[np.ndarray, Geometry]:
            phantom = make_phantom(0, _FIRST_LESION + number, shape, spacing, lesion=kind)
            return rounded(phantom.image), phantom_geometry(phantom)

        jobs.append((f"{IMAGES}/{name}.nii.gz", lesion))
    made: dict[int, PhantomPair] = {}

    def pair(number: int) -> PhantomPair:
        if number not in made:
            made[number] = make_pair(0, _FIRST_PAIR + number, shape, spacing, ("CT", "CT"), _MAX_MM)
        return made[number]

    entries = []
    for number in range(wanted.pairs):
        entry: dict[str, Any] = {"name": f"pair_{number}", "labels": [], "keypoints": []}
        for side in ("fixed", "moving"):
            entry[side] = f"registration/pair_{number}_{side}.nii.gz"
            entry["labels"].append(f"registration/pair_{number}_{side}_labels.nii.gz")
            entry["keypoints"].append(f"registration/pair_{number}_{side}.csv")
            jobs += [(entry[side], _side(pair, number, side, False)), (entry["labels"][-1], _side(pair, number, side, True))]
        entries.append(entry)
    written = write_dataset(folder, {"data": "phantom tasks", **_settings(wanted)}, jobs, lambda: {PAIRS: entries} if entries else {}, workers)
    tables = [CLASSES] * bool(kinds) + [point for entry in entries for point in entry["keypoints"]]
    if written["written"] or not all((folder / file).is_file() for file in tables):
        for number in range(wanted.pairs):
            for side, points in zip(("fixed", "moving"), pair(number).landmarks.transpose(1, 0, 2)):
                write_text(folder / f"registration/pair_{number}_{side}.csv", "x,y,z\n" + "".join(f"{x:.3f},{y:.3f},{z:.3f}\n" for z, y, x in points))
        if kinds:
            write_text(folder / CLASSES, "case,subject,label\n" + "".join(f"{name},{name},{kind}\n" for name, kind in kinds.items()))
    return PHANTOM_TASKS


def _settings(wanted: Generator) -> dict[str, Any]:
    return {"lesions": wanted.lesions, "pairs": wanted.pairs, "size": wanted.size, "spacing": wanted.spacing, "max_mm": _MAX_MM}


def _side(pair: Callable[[int], PhantomPair], number: int, side: str, labels: bool) -> Callable[[], tuple[np.ndarray, Geometry]]:
    def make() -> tuple[np.ndarray, Geometry]:
        phantom = getattr(pair(number), side)
        return phantom.labels if labels else rounded(phantom.image), phantom_geometry(phantom)

    return make
