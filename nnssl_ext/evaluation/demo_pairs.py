"""The data set 803: phantoms with a CT and an MR image of one visit and a CT image of a later one, for methods that learn from pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.core.geometry import Geometry
from nnssl_ext.evaluation.demo_data import Job, phantom_geometry, pretrain_data, rounded, write_dataset
from nnssl_ext.evaluation.phantom import Phantom, make_pair, make_phantom

PHANTOM_PAIRS = "Dataset803_PhantomPairs"
_FIRST = 300_000  # index of the first subject: no other data set has it
_IMAGES = (("visit_0", "CT"), ("visit_0", "MR"), ("visit_1", "CT"))


def write_dataset_803(
    raw_root: Path | str, count: int = 12, seed: int = 0, size: int = 64, spacing: float = 3.0, max_mm: float = 9.0, workers: int = 2
) -> dict[str, Any]:
    """Unlabelled phantoms: CT and MR of the first visit show the same anatomy on one grid, the CT of the second visit shows it deformed.

    With u = ``make_pair(seed, 300000 + subject, ..., max_mm=max_mm).displacement``, in mm, the anatomy of the second visit at x is that of the
    first at x + u(x); each image has its own contrast, texture and noise.

    Args:
        raw_root: nnssl_raw.
        count: subjects, of three volumes each.
        size: voxels per axis.
        spacing: mm.
        max_mm: longest displacement between the visits, mm.
    """
    grid = (size,) * 3, (spacing,) * 3

    def phantom(subject: int, visit: str, modality: str) -> Phantom:
        if modality == "MR":
            return make_phantom(seed, _FIRST + subject, *grid, modality)
        pair = make_pair(seed, _FIRST + subject, *grid, ("CT", "CT"), max_mm)
        return pair.moving if visit == "visit_0" else pair.fixed

    def image(subject: int, visit: str, modality: str) -> Callable[[], tuple[np.ndarray, Geometry]]:
        def make() -> tuple[np.ndarray, Geometry]:
            made = phantom(subject, visit, modality)
            return rounded(made.image), phantom_geometry(made)

        return make

    entries, jobs = [], list[Job]()
    for subject in range(count):
        name = f"phantom_{subject:04d}"
        for visit, modality in _IMAGES:
            file = f"images/{name}_{visit}_{modality}.nii.gz"
            entries.append((name, "phantom", visit, modality, file, {"synthetic": True}))
            jobs.append((file, image(subject, visit, modality)))

    def metadata() -> dict[str, Any]:
        return {"pretrain_data.json": pretrain_data(803, PHANTOM_PAIRS, entries, f"{count} procedural phantoms, three images of each")}

    settings = {"data": "phantom pairs", "count": count, "seed": seed, "size": size, "spacing": spacing, "max_mm": max_mm}
    return write_dataset(Path(raw_root) / PHANTOM_PAIRS, settings, jobs, metadata, workers)
