"""Left and right of a case: where its voxels lie from the sagittal plane through the middle of its body."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.core.geometry import Geometry
from nnssl_ext.preprocessing.store import BODY_CELL, CaseStore


def body_frame(geometry: Geometry, body: np.ndarray) -> np.ndarray:
    """The affine (3, 4) from voxels (z, y, x) of a case to mm from the middle of its body, along the world's axes (x, y, z), LPS.

    So x = 0 is the sagittal plane and x > 0 the patient's left, whichever axes of the array lead there, obliquely or not. The
    middle is the centre of mass of the body's cells, and that of the whole case where no cell is body.

    Args:
        geometry: of the stored case.
        body: its body, see `CaseStore.body`.
    """
    starts = [BODY_CELL * np.arange(cells) for cells in body.shape]
    edges = [np.minimum(BODY_CELL, n - start) for n, start in zip(geometry.shape, starts)]  # the last cell may be cut off
    voxels = reduce(np.multiply.outer, edges) * (body if body.any() else True)
    along = [voxels.sum(tuple({0, 1, 2} - {axis})) for axis in range(3)]
    middle = [np.average(start + (edge - 1) / 2, weights=held) for start, edge, held in zip(starts, edges, along)]
    matrix = np.asarray(geometry.direction, float).reshape(3, 3)[:, ::-1] * geometry.spacing
    return np.column_stack((matrix, -matrix @ middle))


def mirrored(points: np.ndarray) -> np.ndarray:
    """Points (..., 3) of a `body_frame`, mirrored at the sagittal plane."""
    return points * np.array([-1.0, 1.0, 1.0])


class BodyFrames:
    """The `body_frame` of a store's cases, of each when it is first asked for.

    Args:
        store: whose cases they are.
    """

    def __init__(self, store: CaseStore) -> None:
        self.store = store
        self.known: dict[int, np.ndarray] = {}

    def __call__(self, cases: Sequence[int]) -> Tensor:
        """Those of some cases, (B, 3, 4) float64."""
        for case in set(cases) - set(self.known):
            self.known[case] = body_frame(self.store.geometry(case), self.store.body(case))
        return torch.from_numpy(np.stack([self.known[case] for case in cases]))
