"""Tokens and voxels: ONE token order for the whole project, `b c z y x -> b (z y x) c`.

Shape suffixes: B batch, N tokens, K kept tokens, P values of a token's voxels (C * token volume).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


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


def resize_positions(positions_1NC: Tensor, old_grid: Sequence[int], new_grid: Sequence[int]) -> Tensor:
    """Learned position embedding on another token grid: trilinear, align_corners=False; unchanged when equal."""
    if tuple(old_grid) == tuple(new_grid):
        return positions_1NC
    z, y, x = old_grid
    volume = rearrange(positions_1NC, "b (z y x) c -> b c z y x", z=z, y=y, x=x)
    return rearrange(F.interpolate(volume, size=tuple(new_grid), mode="trilinear", align_corners=False), "b c z y x -> b (z y x) c")
