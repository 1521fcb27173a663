"""Displacement fields: warp volumes by them, make, compose and judge them.

A displacement is (B, 3, z, y, x), in voxels over the axes (z, y, x): what is seen at voxel p comes from p + u(p). Voxel centres are
whole numbers from 0 to n - 1 (`align_corners`). Everything is computed in fp32 (fp64 for fp64), whatever the precision around it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.nn.precision import wide


def identity_grid(shape: Sequence[int], like: Tensor) -> Tensor:
    """Where every voxel lies, (3, z, y, x), in voxels; type and device of `like`."""
    return torch.stack(torch.meshgrid(*(torch.arange(n, dtype=like.dtype, device=like.device) for n in shape), indexing="ij"))


def warp(image: Tensor, displacement: Tensor, mode: str = "bilinear", padding: str = "border") -> Tensor:
    """Volumes (B, C, z, y, x) as seen through displacements of the same voxels, in one interpolation.

    Args:
        image: what is warped.
        displacement: (B, 3, z, y, x), voxels.
        mode: "bilinear" (that is trilinear) or "nearest".
        padding: what lies outside: "border", the nearest voxel, or "zeros".
    """
    with torch.autocast(image.device.type, enabled=False):
        image, displacement = wide(image), wide(displacement)
        shape = displacement.shape[2:]
        last = displacement.new_tensor([max(1, n - 1) for n in shape]).view(3, 1, 1, 1)
        places = (identity_grid(shape, displacement) + displacement) * (2 / last) - 1
        return F.grid_sample(image, places.flip(1).movedim(1, -1).to(image.dtype), mode=mode, padding_mode=padding, align_corners=True)


def affine_matrix(parameters: Tensor, shape: Sequence[int], spacing: Sequence[float] = (1.0, 1.0, 1.0), linear: float = 0.35, shift: float = 0.25) -> Tensor:
    """Affine maps (B, 3, 4) in voxels about the middle of a volume, the identity for parameters of zero.

    The linear part is the exponential of a matrix: rotations, zooms and shears in one, never singular or mirroring. Every
    parameter goes through tanh, so that none is lost to a limit.

    Args:
        parameters: (B, 12): the matrix in mm, row by row, then the shift.
        shape: voxels, (z, y, x).
        spacing: mm, (z, y, x).
        linear: largest entry of the matrix: 0.35 is a rotation of 20 degrees, or a zoom by 0.7 to 1.4.
        shift: largest one, in edges of the volume.
    """
    with torch.autocast(parameters.device.type, enabled=False):
        bounded = torch.tanh(wide(parameters))
        edge = bounded.new_tensor(spacing)
        matrix = torch.linalg.matrix_exp(linear * bounded[:, :9].view(-1, 3, 3) * edge / edge[:, None])
        return torch.cat((matrix, (shift * bounded.new_tensor(shape) * bounded[:, 9:])[:, :, None]), 2)


def affine_displacement(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """The displacement (B, 3, z, y, x) of affine maps.

    Args:
        matrix: (B, 3, 4), voxels, about the middle of the volume.
        shape: voxels, (z, y, x).
    """
    with torch.autocast(matrix.device.type, enabled=False):
        matrix = wide(matrix)
        places = identity_grid(shape, matrix)
        centred = places - (matrix.new_tensor(shape).view(3, 1, 1, 1) - 1) / 2
        moved = torch.einsum("bij,jzyx->bizyx", matrix[:, :, :3] - torch.eye(3, dtype=matrix.dtype, device=matrix.device), centred)
        return moved + matrix[:, :, 3, None, None, None]


def compose(first: Tensor, second: Tensor) -> Tensor:
    """The displacement that goes from p to p + first(p), and on from there by `second`; warping by it is warping by `second`, then by `first`."""
    return wide(first) + warp(second, first)


def exponential(velocity: Tensor, squarings: int = 7) -> Tensor:
    """The displacement after following a stationary velocity for a unit of time, by scaling and squaring.

    Args:
        velocity: (B, 3, z, y, x), voxels.
        squarings: the first step is 1 / 2^squarings of the velocity.

    Source: Arsigny et al. 2006, doi:10.1007/11866565_113.
    """
    displacement = wide(velocity) / 2**squarings
    for _ in range(squarings):
        displacement = compose(displacement, displacement)
    return displacement


def jacobian_determinant(displacement: Tensor) -> Tensor:
    """Volume (B, z, y, x) of a voxel after a displacement over that before; negative where space folds. Two voxels along each axis at least.

    It is the same in voxels and in mm: changing the unit of an axis is undone by the inverse change.
    """
    places = identity_grid(displacement.shape[2:], wide(displacement)) + wide(displacement)
    gradients = torch.stack(torch.gradient(places, dim=(2, 3, 4)), -1)  # central differences, one-sided ones at the borders
    return torch.linalg.det(gradients.movedim(1, -2))
