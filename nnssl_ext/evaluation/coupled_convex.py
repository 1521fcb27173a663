"""Convex coupled optimisation: the displacement of every cell out of a whole neighbourhood of candidates, no gradient needed.

Shape suffixes: K candidates, N cells, (d, h, w) the grid of the cells. Displacements are in cells.

Source: Heinrich et al. 2014, Non-parametric discrete registration with convex optimisation, doi:10.1007/978-3-319-08554-8_6; Siebert et al. 2025,
ConvexAdam, doi:10.1109/TMI.2024.3436713 (features, window, couplings, inverse consistency).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnssl_ext.evaluation.control_grids import ControlGrids

COUPLINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
FIRST = 1e-6  # coupling to no motion before those: decides only between candidates that are equally alike, as in air
WINDOW, PASSES = 3, 2  # of the dissimilarity; displacements are smoothed once
CONSISTENT = 15  # passes
CHUNK = 1 << 24  # candidates of cells that are compared at once


def candidates(reach: int, like: Tensor) -> Tensor:
    """All displacements of up to `reach` cells along each axis, (K, 3) with K = (2 reach + 1)^3, the last axis fastest."""
    steps = torch.arange(-reach, reach + 1, dtype=like.dtype, device=like.device)
    return torch.cartesian_prod(steps, steps, steps).view(-1, 3)


def dissimilarity(fixed: Tensor, moving: Tensor, reach: int, grids: ControlGrids) -> Tensor:
    """How unlike the features of each cell and those of every candidate are, (K, d, h, w): the sum of squares over channels, averaged over windows.

    Args:
        fixed, moving: (1, C, d, h, w).
        reach: of the candidates, cells.
        grids: the convention.
    """
    shape = fixed.shape[2:]
    shifted = grids.around(moving, reach)[0]
    for axis, n in enumerate(shape):
        shifted = shifted.unfold(1 + axis, n, 1)  # a view (C, 2 reach + 1, 2 reach + 1, 2 reach + 1, d, h, w)
    total = fixed.new_zeros([2 * reach + 1] * 3 + list(shape))
    for here, there in zip(fixed[0], shifted):  # channel by channel: all at once would take C times the memory
        apart = here - there
        total.addcmul_(apart, apart)
    return grids.smooth(total.view(-1, 1, *shape), WINDOW, PASSES)[:, 0]


def coupled_convex(apart: Tensor, reach: int, grids: ControlGrids) -> Tensor:
    """A smooth displacement (1, 3, d, h, w) of little dissimilarity.

    In turn, every cell takes the candidate k of least apart_k + coupling * |k - u|^2, and u is what smoothing leaves of these; the coupling rises.

    Args:
        apart: dissimilarity, (K, d, h, w).
        reach: of the candidates, cells.
        grids: the convention.
    """
    options_K3, apart_KN = candidates(reach, apart), apart.flatten(1)
    smooth = apart.new_zeros(1, 3, *apart.shape[1:])
    for coupling in (FIRST, *COUPLINGS):
        chosen = []
        for part_KN, u_3N in zip(*(x.split(max(1, CHUNK // len(options_K3)), 1) for x in (apart_KN, smooth[0].flatten(1)))):
            far_KN = part_KN + coupling * options_K3.square().sum(1, keepdim=True)  # |k - u|^2 less |u|^2, which is the same for all candidates
            chosen.append(far_KN.addmm_(options_K3, u_3N, alpha=-2 * coupling).argmin(0))
        smooth = grids.smooth(options_K3[torch.cat(chosen)].T.reshape_as(smooth), WINDOW, 1)
    return smooth


def inverse_consistent(forward: Tensor, backward: Tensor, grids: ControlGrids) -> tuple[Tensor, Tensor]:
    """The two displacements drawn together until each nearly undoes the other: in turn, each becomes the mean of itself and the other's inverse.

    Args:
        forward, backward: (1, 3, d, h, w), cells.
        grids: the convention.
    """
    for _ in range(CONSISTENT):
        forward, backward = (forward - grids.warp(backward, forward)) / 2, (backward - grids.warp(forward, backward)) / 2
    return forward, backward


def convex_registration(fixed: Tensor, moving: Tensor, reach: int, grids: ControlGrids) -> Tensor:
    """The displacement (1, 3, d, h, w) from features (1, C, d, h, w) of both images, consistent with that from moving to fixed."""
    forward, backward = (coupled_convex(dissimilarity(*pair, reach, grids), reach, grids) for pair in ((fixed, moving), (moving, fixed)))
    return inverse_consistent(forward, backward, grids)[0]
