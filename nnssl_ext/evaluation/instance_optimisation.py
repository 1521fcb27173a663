"""Instance optimisation: the displacement of one pair refined by Adam.

Source: Siebert et al. 2025, ConvexAdam, doi:10.1109/TMI.2024.3436713, section III-C.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nnssl_ext.evaluation.control_grids import ControlGrids
from nnssl_ext.nn.registration_losses import flow_gradient


def optimise(
    fixed: Tensor, moving: Tensor, start: Tensor, grids: ControlGrids, iterations: int, lr: float, regularisation: float, window: int, passes: int
) -> Tensor:
    """A displacement (1, 3, d, h, w), in cells, under which the features are alike and which is smooth.

    It is that of control points after repeated means over windows, which makes it a spline; one mean more at the end takes out part of what noise added.
    Minimised is the squared difference of the features, summed over channels and averaged over the cells that stay in the image, plus the regularisation
    times the sum over the axes of the mean squared difference of neighbours (diffusion). The best displacement met on the way counts: Adam's steps are long
    however small the gradient is, and would lead away from a perfect start. Its first ones often make matters worse: fewer than some twenty iterations may
    give the start back.

    Args:
        fixed, moving: (1, C, d, h, w).
        start: displacement of the control points before, (1, 3, d, h, w), cells.
        grids: the convention.
        iterations: of Adam.
        lr: its learning rate, cells.
        regularisation: weight of the diffusion.
        window, passes: of the means.
    """
    control, best = start.detach().clone().requires_grad_(), math.inf
    field = grids.relax(start, window, passes)
    sample = grids.sampler(moving)
    adam = torch.optim.Adam([control], lr)
    with torch.enable_grad():
        for _ in range(iterations):
            now = grids.relax(control, window, passes)
            apart, seen = (sample(now) - fixed).square().sum(1), grids.seen(now)
            loss = apart.where(seen, 0).sum() / seen.sum().clamp_min(1) + regularisation * 3 * flow_gradient(now)  # a mean over three axes
            if float(loss.detach()) < best:
                field, best = now.detach(), float(loss.detach())
            control.grad = torch.autograd.grad(loss, control)[0]
            adam.step()
    return grids.relax(field, window, 1)
