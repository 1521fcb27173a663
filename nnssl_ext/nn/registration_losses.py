"""Losses of registrations: stateless functions, computed in fp32 (fp64 for fp64)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.nn.precision import wide

FLAT = 1e-4  # share of a crop's variance that is added to the variance in a window: flat windows, where rounding is all, count as unlike
TINY = 1e-10  # the same for crops that are flat all over


def squared_lncc(a: Tensor, b: Tensor, window: int = 9) -> Tensor:
    """Mean over all voxels of the squared correlation of two volumes in the window around a voxel: 0 for unlike ones, 1 where one is a linear map of the other.

    A window that sticks out holds the voxels inside. Scale and offset of either volume don't matter, nor does the sign of the scale.

    Args:
        a, b: (B, C, z, y, x); each channel is compared with the same one.
        window: edge in voxels, odd.

    Source: Avants et al. 2008, doi:10.1016/j.media.2007.06.004 (squared local correlation); Balakrishnan et al. 2019, arXiv:1809.05231, eq. 5 (the loss).
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = (wide(x) - wide(x).mean((2, 3, 4), keepdim=True) for x in (a, b))  # far from zero, squares would round the variance away
        mean_a, mean_b, aa, bb, ab = window_mean(torch.cat((a, b, a * a, b * b, a * b), 1), window).chunk(5, 1)
        variances = [square - mean.square() + FLAT * x.square().mean((2, 3, 4), keepdim=True) + TINY for x, square, mean in ((a, aa, mean_a), (b, bb, mean_b))]
        return ((ab - mean_a * mean_b).square() / (variances[0] * variances[1])).mean()


def window_mean(x: Tensor, window: int) -> Tensor:
    """Mean over the window around each voxel of (B, C, z, y, x), as far as it lies inside; axis by axis."""
    reach = window // 2
    for axis in (2, 3, 4):
        place = torch.arange(x.shape[axis], device=x.device)
        inside = (place.clamp_max(reach) + place.flip(0).clamp_max(reach) + 1).view([-1 if i == axis else 1 for i in range(5)])
        edges = [window if i == axis else 1 for i in (2, 3, 4)]
        x = F.avg_pool3d(F.pad(x, [side for edge in reversed(edges) for side in [edge // 2] * 2]), edges, 1) * (window / inside.to(x.dtype))
    return x


def flow_gradient(flow: Tensor) -> Tensor:
    """Mean over the three axes of the mean squared difference of neighbours along the axis.

    Args:
        flow: (B, 3, z, y, x), two voxels along each axis at least.

    Source: Balakrishnan et al. 2019, arXiv:1809.05231, eq. 6.
    """
    return torch.stack([wide(flow).diff(dim=axis).square().mean() for axis in (2, 3, 4)]).mean()


def end_point_error(displacement: Tensor, true: Tensor) -> Tensor:
    """Mean distance over the voxels of each sample between where two displacements lead to, (B,).

    Args:
        displacement, true: (B, 3, z, y, x), in the unit of the result.
    """
    return torch.linalg.vector_norm(wide(displacement) - wide(true), dim=1).mean((1, 2, 3))
