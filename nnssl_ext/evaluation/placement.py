"""Volumes brought onto another grid in the world."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.core.geometry import Geometry
from nnssl_ext.nn.precision import wide
from nnssl_ext.nn.warp import identity_grid


def index_to_world(geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (3, 3) and offset (3,) that lead from voxels (z, y, x) to the world (x, y, z) in mm."""
    matrix = np.reshape(geometry.direction, (3, 3)) @ np.diag(geometry.spacing[::-1])
    return matrix[:, ::-1].astype(np.float64), np.asarray(geometry.origin, np.float64)


def to_index(points_n3: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Fractional voxels (z, y, x) of points (n, 3) of the world (x, y, z)."""
    matrix, offset = index_to_world(geometry)
    return np.asarray(np.linalg.solve(matrix, (points_n3 - offset).T).T)


def place(values: Tensor, geometry: Geometry, onto: Geometry, displacement: Tensor | None = None, mode: str = "bilinear", padding: str = "border") -> Tensor:
    """Volumes (C, z, y, x) at the voxels of another grid, in one interpolation; the same ones where nothing is to be done.

    Args:
        values: what is sampled.
        geometry: where it lies.
        onto: the new grid.
        displacement: sample at p + u(p) for the voxels p of the new grid, (3, z, y, x) in its voxels.
        mode: "bilinear" (that is trilinear) or "nearest".
        padding: what lies outside: "border", the nearest voxel, or "zeros".
    """
    if displacement is None and geometry == onto:
        return values
    (matrix, offset), (target, shift) = index_to_world(geometry), index_to_world(onto)
    places = identity_grid(onto.shape, torch.zeros((), dtype=torch.float64, device=values.device))
    if displacement is not None:
        places = places + displacement
    turn = torch.from_numpy(np.linalg.solve(matrix, target)).to(places)
    first = torch.from_numpy(np.linalg.solve(matrix, shift - offset)).to(places)
    places = torch.einsum("ij,jzyx->izyx", turn, places) + first.view(3, 1, 1, 1)
    shape = places.new_tensor(values.shape[1:]).view(3, 1, 1, 1)
    faces = ((2 * places + 1) / shape - 1).flip(0).movedim(0, -1)[None]  # outer faces at -1 and 1, also for a single voxel
    values = wide(values)
    return F.grid_sample(values[None], faces.to(values.dtype), mode=mode, padding_mode=padding, align_corners=False)[0]
