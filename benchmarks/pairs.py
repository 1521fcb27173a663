"""Phantoms with a CT and an MR image of one visit each, read like a case store."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.ndimage import gaussian_filter

from benchmarks.common import PairedStore
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.evaluation.phantom import make_phantom

WINDOW = (-200.0, 300.0)  # HU


class PairedPhantoms(PairedStore):
    """CT and MR images in turn, (1, z, y, x), of zero mean and unit variance after clipping: CT to a window of soft tissues, MR at its 99.5 % percentile.

    Args:
        subjects: indices of the phantoms.
        size: voxels per edge.
        spacing: mm.
        smooth: standard deviation in voxels of a Gaussian kernel; takes texture and noise away, which modalities don't share.
    """

    def __init__(self, subjects: Iterable[int], size: int, spacing: float, smooth: float = 0.0) -> None:
        self.spacing, volumes = (spacing,) * 3, []
        for subject in subjects:
            for modality in ("CT", "MR"):
                image = make_phantom(0, subject, (size,) * 3, self.spacing, modality).image
                image = image.clip(*(WINDOW if modality == "CT" else (0.0, float(np.percentile(image, 99.5)))))
                image = gaussian_filter(image, smooth) if smooth else image
                volumes.append(((image - image.mean()) / image.std()).astype(np.float32))
        self.arrays = np.stack(volumes)[:, None]

    def geometry(self, case: int) -> Geometry:
        return Geometry(self.shape(case), self.spacing)

    def fill(self, case: int) -> list[float]:
        return [float(self.arrays[case].min())]
