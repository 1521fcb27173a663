"""How well a registration fits and how regular it is.

Arrays are (z, y, x), spacing is mm in that order, displacements are (3, z, y, x) in voxels (see `registration`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from nnssl_ext.nn.warp import jacobian_determinant

FLOOR = 1e-9  # determinants below count as this in the logarithm


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice coefficient of two masks; NaN where both are empty."""
    total = int(np.count_nonzero(a)) + int(np.count_nonzero(b))
    return 2 * int(np.count_nonzero(a & b)) / total if total else math.nan


def surface_distances(a: np.ndarray, b: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Distances in mm from every surface voxel of mask a to the nearest one of mask b, and of b to a; both empty where a mask is.

    Surface voxels have a neighbour across a face that is not in the mask; beyond the volume nothing is. Distances are between voxel centres.
    """
    if not (a.any() and b.any()):
        return np.zeros(0), np.zeros(0)
    box = ndimage.find_objects((a | b).astype(np.uint8))[0]
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (a[box], b[box])]
    to_a, to_b = (ndimage.distance_transform_edt(~edge, sampling=spacing) for edge in edges)
    return to_b[edges[0]], to_a[edges[1]]


def hd95(distances: tuple[np.ndarray, np.ndarray]) -> float:
    """95 % Hausdorff distance, mm: the larger of the two directions' 95 % percentiles; NaN where a mask is empty."""
    return float(max(np.percentile(d, 95) for d in distances)) if all(map(len, distances)) else math.nan


def assd(distances: tuple[np.ndarray, np.ndarray]) -> float:
    """Average symmetric surface distance, mm: the mean over the surface voxels of both masks; NaN where one is empty."""
    return float(np.concatenate(distances).mean()) if all(map(len, distances)) else math.nan


def label_metrics(fixed: np.ndarray, warped: np.ndarray, spacing: Sequence[float]) -> dict[int, dict[str, float]]:
    """Dice, HD95 and ASSD (mm) of every label of the fixed image but 0."""
    result = {}
    for label in (int(value) for value in np.unique(fixed) if value):
        a, b = fixed == label, warped == label
        distances = surface_distances(a, b, spacing)
        result[label] = {"dice": dice(a, b), "hd95_mm": hd95(distances), "assd_mm": assd(distances)}
    return result


def landmark_errors(fixed_n3: np.ndarray, moving_n3: np.ndarray, displacement: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Target registration errors (n,) in mm: how far p + u(p) is from where the landmark p lies in the moving image.

    Args:
        fixed_n3, moving_n3: landmarks in (fractional) voxels (z, y, x) of the fixed image's grid; u is interpolated linearly between voxels.
        displacement: (3, z, y, x), voxels.
        spacing: mm.
    """
    moved = np.stack([ndimage.map_coordinates(component.astype(np.float64), fixed_n3.T, order=1, mode="nearest") for component in displacement], 1)
    errors: np.ndarray = np.linalg.norm((fixed_n3 + moved - moving_n3) * np.asarray(spacing), axis=1)
    return errors


def regularity(displacement: np.ndarray, mask: np.ndarray | None = None) -> dict[str, float]:
    """How much a displacement stretches and folds space: "sd_log_j" and "folded".

    J is the determinant of I + grad u (central differences, one-sided ones at the faces). "sd_log_j" is the standard deviation of ln J, J at least 1e-9;
    nothing is added to J (public code that adds 3 gives far smaller values). "folded" is the share of voxels with J <= 0.

    Args:
        displacement: (3, z, y, x), voxels, two along each axis at least.
        mask: bool, the voxels that count; None: all.
    """
    determinant = jacobian_determinant(torch.from_numpy(displacement.astype(np.float64))[None])[0].numpy()
    counted = determinant[mask] if mask is not None and mask.any() else determinant.ravel()
    return {"sd_log_j": float(np.log(counted.clip(FLOOR)).std()), "folded": float((counted <= 0).mean())}
