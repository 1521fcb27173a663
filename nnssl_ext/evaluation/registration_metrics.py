"""How well a registration fits and how regular it is.

Arrays are (z, y, x), spacing is mm in that order, displacements are (3, z, y, x) in voxels (see `registration`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from nnssl_ext.evaluation.segmentation_metrics import dice
from nnssl_ext.evaluation.surface_distances import SurfaceDistances
from nnssl_ext.nn.warp import jacobian_determinant

FLOOR = 1e-9  # determinants below count as this in the logarithm


def label_metrics(fixed: np.ndarray, warped: np.ndarray, spacing: Sequence[float]) -> dict[int, dict[str, float]]:
    """Dice, HD95 and ASSD (mm) of every label of the fixed image but 0."""
    result = {}
    for label in (int(value) for value in np.unique(fixed) if value):
        a, b = fixed == label, warped == label
        apart = SurfaceDistances.between(a, b, spacing)
        result[label] = {"dice": dice(a, b), "hd95_mm": apart.hd95(), "assd_mm": apart.assd()}
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
