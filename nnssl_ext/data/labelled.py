"""Views beside the labels of their voxels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnssl_ext.data.spatial import bounds, is_slicing, to_case
from nnssl_ext.data.views import View, ViewSpec, read_box, read_crops
from nnssl_ext.preprocessing.clusters import ClusterLabels
from nnssl_ext.preprocessing.store import CaseStore


@dataclass(frozen=True)
class Labelled:
    """The views of another specification, and for each one, NAME, its labels as view "NAME_labels", (1, z, y, x); 0 beyond the case.

    Args:
        spec: whose views they are.
        labels: of all voxels of the store's cases.
    """

    spec: ViewSpec
    labels: ClusterLabels

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        views = self.spec.sample(store, case, rng)
        found = {f"{name}_labels": View(read_labels(self.labels, case, view.affine, view.image.shape[1:]), view.affine) for name, view in views.items()}
        return views | found


def read_labels(labels: ClusterLabels, case: int, affine: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Labels of the voxels of a crop, those of the nearest voxels of the case, (1, *size) float32; 0 beyond the case.

    Args:
        affine: (3, 4), from voxels of the crop to voxels of the case.
        size: voxels of the crop.
    """
    if is_slicing(affine):
        return read_crops(labels, case, [affine], [size])[0].astype(np.float32)  # type: ignore[arg-type]
    box = bounds(affine, size)
    source = read_box(labels, case, box)  # type: ignore[arg-type]
    places = np.rint(to_case(affine, np.moveaxis(np.indices(tuple(size)), 0, -1))).astype(int) - [low for low, _ in box]
    found: np.ndarray = source[:, places[..., 0], places[..., 1], places[..., 2]].astype(np.float32)
    return found
