"""Image files for the benchmarks of preprocessing: int16 .nii.gz as scanners' archives hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnssl_ext.core.geometry import box_slices
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.evaluation import torso
from nnssl_ext.evaluation.phantom import make_phantom
from nnssl_ext.io.index import Case
from nnssl_ext.preprocessing.crop import body_mask, bounding_box

BODIES = 3  # phantoms drawn; the other volumes are derived from them, which is a hundred times as fast
SPACING = (2.0, 1.4, 1.4)


def phantoms(folder: Path, count: int, shape: Sequence[int], crop: bool = False) -> list[Case]:
    """CT phantoms: after the first few, mirrored ones with new noise and another calibration.

    Args:
        folder: where the files go.
        count: number of volumes.
        shape: voxels (z, y, x).
        crop: keep the box around the body only.
    """
    bodies: list[np.ndarray] = []
    cases = []
    for index in range(count):
        if index < BODIES:
            bodies.append(make_phantom(0, index, shape, SPACING, "CT").image)
            volume = bodies[index]
        else:
            rng = sample_rng(0, index, "benchmark volume")
            volume = bodies[index % BODIES][:, :, :: rng.choice((-1, 1))] * rng.uniform(0.97, 1.03)
            volume = volume + rng.normal(0, 8, volume.shape).astype(np.float32)
        cases.append(_write(folder / f"phantom{index:02}_0000.nii.gz", volume, SPACING, crop))
    return cases


def torso_cts(folder: Path, crop: bool = False) -> list[Case]:
    """The real CTs of `evaluation.torso`; none where they were never fetched."""
    if not torso.is_cached():
        return []
    scans = {name: torso.load_scan(name) for name, source in torso.SCANS.items() if source.modality == "CT"}
    return [_write(folder / f"{name}_0000.nii.gz", scan.image, scan.geometry.spacing, crop) for name, scan in scans.items()]


def _write(path: Path, volume: np.ndarray, spacing: Sequence[float], crop: bool) -> Case:
    if crop:
        volume = volume[box_slices(bounding_box(body_mask(volume, "CT")))[1:]]
    image = sitk.GetImageFromArray(np.rint(volume).clip(-1024, 3071).astype(np.int16))
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, str(path), True)
    name = path.name.removesuffix("_0000.nii.gz")
    return Case(name, name, "session", (path,), ("CT",))
