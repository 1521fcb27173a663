"""Interpolation at few places against that of whole volumes."""

import pytest
import torch

from nnssl_ext.evaluation.control_grids import ControlGrids
from nnssl_ext.evaluation.interpolation import Interpolated
from nnssl_ext.nn.warp import warp


@pytest.mark.parametrize("shape", [(5, 6, 7), (4, 1, 3)])
def test_values_and_gradient_are_those_of_warping_inside_and_outside(shape):
    torch.manual_seed(0)
    values = torch.randn(1, 3, *shape, dtype=torch.float64)
    displacement = (1.5 * torch.randn(1, 3, *shape, dtype=torch.float64)).requires_grad_()
    expected, found = warp(values, displacement), ControlGrids().sampler(values)(displacement)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((result * weights).sum(), displacement)[0] for result in (expected, found)]
    if 1 not in shape:  # there the other has a slope across a single voxel
        torch.testing.assert_close(gradients[1], gradients[0])


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    places = (torch.rand(3, 8, dtype=torch.float64) * 2 + 0.4).requires_grad_()  # between 0.4 and 2.4 of 0 to 3
    values = torch.randn(4 * 4 * 4, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: Interpolated.apply(x, values, (4, 4, 4)), (places,))
