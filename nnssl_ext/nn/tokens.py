"""Tokens and voxels: ONE token order for the whole project, `b c z y x -> b (z y x) c`.

Shape suffixes: B batch, N tokens, K kept tokens, P values of a token's voxels (C * token volume).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nnssl_ext.nn.precision import wide

_VARIANCE = 1e-6  # added to that of a block, as in the source


def patchify(x_BCZYX: Tensor, token: Sequence[int]) -> Tensor:
    """Voxels of each token, (B, N, C * token volume); inside a token the order is (c, z, y, x)."""
    pz, py, px = token
    return rearrange(x_BCZYX, "b c (z pz) (y py) (x px) -> b (z y x) (c pz py px)", pz=pz, py=py, px=px)


def unpatchify(values_BNP: Tensor, grid: Sequence[int], token: Sequence[int]) -> Tensor:
    """Inverse of `patchify`: (B, C, z, y, x)."""
    (z, y, x), (pz, py, px) = grid, token
    return rearrange(values_BNP, "b (z y x) (c pz py px) -> b c (z pz) (y py) (x px)", z=z, y=y, x=x, pz=pz, py=py, px=px)


def gather(x_BNC: Tensor, index_BK: Tensor) -> Tensor:
    """Rows of `x_BNC` at `index_BK`, (B, K, C)."""
    return x_BNC.gather(1, index_BK[..., None].expand(-1, -1, x_BNC.shape[-1]))


def split_tokens(hidden_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending indices of the visible and of the hidden tokens, (B, K) and (B, N - K); equal counts per sample."""
    order = hidden_BN.long().sort(dim=1, stable=True).indices
    visible = hidden_BN.shape[1] - int(hidden_BN[0].sum())
    return order[:, :visible], order[:, visible:]


def enlarge(cells: Tensor, shape: Sequence[int]) -> Tensor:
    """Cells (..., d, h, w) as voxels (..., z, y, x), nearest neighbour; cells have equal edges but for the last of an axis."""
    for axis, size in enumerate(shape, start=-3):
        cells = cells.repeat_interleave(-(-size // cells.shape[axis]), dim=axis).narrow(axis, 0, size)
    return cells


def voxel_mask(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask of blocks or tokens (B, d, h, w) as voxel mask (B, 1, z, y, x)."""
    return enlarge(mask, shape)[:, None]


def block_moments(image_BCZYX: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the block that each voxel lies in, by channel: both (B, C, z, y, x).

    Args:
        image_BCZYX: in any precision; moments are in fp32 (fp64 for fp64).
        grid: blocks along (z, y, x); they have equal edges but for the last of an axis.

    Source: He et al. 2022, arXiv:2111.06377, section 3 (normalised patches).
    """
    image, shape = wide(image_BCZYX), image_BCZYX.shape[2:]
    edges = [-(-size // cells) for size, cells in zip(shape, grid)]

    def averaged(x: Tensor) -> Tensor:
        return enlarge(F.avg_pool3d(x, edges, ceil_mode=True), shape)

    mean = averaged(image)
    mean = mean + averaged(image - mean)  # a sum of thousands of voxels is off by more than the deviation that a constant block gets
    variance = averaged((image - mean).square())
    return mean, (variance + _VARIANCE).sqrt()


def resize_positions(positions_1NC: Tensor, old_grid: Sequence[int], new_grid: Sequence[int]) -> Tensor:
    """Learned position embedding on another token grid: trilinear, align_corners=False; unchanged when equal."""
    if tuple(old_grid) == tuple(new_grid):
        return positions_1NC
    z, y, x = old_grid
    volume = rearrange(positions_1NC, "b (z y x) c -> b c z y x", z=z, y=y, x=x)
    return rearrange(F.interpolate(volume, size=tuple(new_grid), mode="trilinear", align_corners=False), "b c z y x -> b (z y x) c")
