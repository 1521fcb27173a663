"""Where the tokens of two views lie relative to each other, in mm, and how a transformer is told.

Shape suffixes: B batch, N tokens, C width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_LONGEST = 10_000.0  # slowest over fastest frequency


def token_places(affine_a: Tensor, affine_b: Tensor, size: Sequence[int], token: Sequence[int], spacing: Sequence[float]) -> Tensor:
    """Centres of the tokens of view b in mm from the centre of view a, along the axes of view a, mirrored and turned as it is.

    So those of view a itself are always the same, and the same anatomy has the same place in both views.

    Args:
        affine_a, affine_b: from voxels of each view to voxels of one case, (B, 3, 4), see `data.spatial`.
        size: voxels of either view, (z, y, x).
        token: voxels of a token, (z, y, x); divides the size.
        spacing: mm of the case's voxels, (z, y, x).

    Returns:
        (B, N, 3) float64, (z, y, x), in the order of `tokens.patchify`, on the affines' device.
    """
    a, b = affine_a.double(), affine_b.double()
    edge, mm = a.new_tensor(token), a.new_tensor(spacing)
    cells = torch.cartesian_prod(*(torch.arange(n // t, dtype=a.dtype, device=a.device) for n, t in zip(size, token, strict=True)))
    voxels = (cells + 0.5) * edge - 0.5
    case = voxels @ b[:, :, :3].mT + b[:, None, :, 3]
    places = (case - a[:, None, :, 3]) @ torch.linalg.inv(a[:, :, :3]).mT - (a.new_tensor(size) - 1) / 2
    return places * (mm[:, None] * a[:, :, :3]).norm(dim=1)[:, None]  # a voxel of view a in mm


def composed(outer: Tensor, inner: Tensor) -> Tensor:
    """The affines (B, 3, 4) that apply `inner`, then `outer`."""
    matrix = outer[:, :, :3]
    return torch.cat((matrix @ inner[:, :, :3], matrix @ inner[:, :, 3:] + outer[:, :, 3:]), 2)


def sine_cosine(places: Tensor, width: int) -> Tensor:
    """Fixed position embedding, (B, N, C): sines and cosines of each coordinate at frequencies in geometric progression; what a sixth of the width leaves is 0.

    Args:
        places: (B, N, 3), in units of which a token's edge is about one.
        width: channels C, six at least.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5; a third of the channels for each axis.
    """
    count = width // 6
    frequencies = _LONGEST ** (-torch.arange(count, dtype=places.dtype, device=places.device) / count)
    angles = (places[..., None] * frequencies).flatten(2)
    return F.pad(torch.cat((angles.sin(), angles.cos()), 2), (0, width - 6 * count))
