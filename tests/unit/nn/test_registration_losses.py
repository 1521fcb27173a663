"""Losses of registrations against plain loops in fp64."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from nnssl_ext.nn.registration_losses import FLAT, TINY, flow_gradient, squared_lncc, window_mean


def around(place, shape, window):
    reach = window // 2
    return tuple(slice(max(0, p - reach), min(n, p + reach + 1)) for p, n in zip(place, shape))


def plain_lncc(a, b, window):
    """Window after window, by the definition of variance and covariance."""
    terms = []
    for sample, channel in np.ndindex(a.shape[:2]):
        x, y = a[sample, channel], b[sample, channel]
        spread = [FLAT * (v - v.mean()).square().mean() + TINY for v in (x, y)]
        for place in np.ndindex(x.shape):
            box = around(place, x.shape, window)
            p, q = x[box] - x[box].mean(), y[box] - y[box].mean()
            terms.append((p * q).mean() ** 2 / ((p.square().mean() + spread[0]) * (q.square().mean() + spread[1])))
    return torch.stack(terms).mean()


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("shape", "window"), [((4, 7, 12), 9), ((5, 5, 5), 3), ((1, 2, 11), 9)])
def test_the_correlation_and_its_gradient_equal_plain_loops(shape, window, kind, tolerance):
    torch.manual_seed(0)
    a, b = 3 + torch.randn(2, 2, *shape, dtype=torch.float64), torch.randn(2, 2, *shape, dtype=torch.float64)
    b += a
    mine, theirs = (a.to(kind, copy=True).requires_grad_(), b.to(kind, copy=True)), a.clone().requires_grad_()
    found, expected = squared_lncc(*mine, window), plain_lncc(theirs, b, window)
    found.backward()
    expected.backward()
    assert found.dtype == kind and found.item() == pytest.approx(expected.item(), rel=tolerance)
    assert float((mine[0].grad.double() - theirs.grad).norm() / theirs.grad.norm()) < max(tolerance, 1e-9)


def test_windows_at_the_border_hold_what_is_inside():
    x = torch.randn(2, 3, 4, 11, 9, dtype=torch.float64)
    found = window_mean(x, 9)
    for place in np.ndindex(x.shape[2:]):
        torch.testing.assert_close(found[(..., *place)], x[(slice(None), slice(None), *around(place, x.shape[2:], 9))].mean((2, 3, 4)))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (-1, 0), (0.01, 5), (-250, 1000), (2, -3)])
def test_a_linear_map_of_a_textured_volume_is_fully_alike(scale, offset, kind):
    torch.manual_seed(0)
    image = torch.randn(2, 1, 16, 12, 20, dtype=kind)
    assert squared_lncc(image, scale * image + offset).item() == pytest.approx(1, abs=1e-3)


def test_unlike_volumes_are_hardly_alike():
    torch.manual_seed(0)
    a, b = torch.randn(2, 2, 1, 24, 24, 24)
    assert 0 <= squared_lncc(a, b).item() < 0.01


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 2.5, -1e4])
def test_constant_volumes_cost_nothing_and_have_finite_gradients(value, kind):
    constant, texture = torch.full((1, 1, 12, 12, 12), value, dtype=kind), torch.randn(1, 1, 12, 12, 12, dtype=kind)
    for pair in ((constant, constant), (constant, texture), (texture, constant)):
        a, b = (x.clone().requires_grad_() for x in pair)
        found = squared_lncc(a, b)
        found.backward()
        assert 0 <= found.item() < 1e-3
        assert bool(torch.isfinite(a.grad).all()) and bool(torch.isfinite(b.grad).all())


@pytest.mark.parametrize("background", [-1.5, -40.0])
def test_constant_regions_far_from_the_mean_are_as_in_double_precision(background):
    torch.manual_seed(0)
    image = torch.full((1, 1, 32, 32, 32), background, dtype=torch.float64)
    image[..., :16] = torch.randn(1, 1, 32, 32, 16, dtype=torch.float64)
    other = image.clone()
    other[..., :16] += torch.randn(1, 1, 32, 32, 16, dtype=torch.float64)
    found = []
    for kind in (torch.float32, torch.float64):
        a = image.to(kind).requires_grad_()
        value = squared_lncc(a, other.to(kind))
        value.backward()
        found.append((value.item(), a.grad.double()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    assert float((found[0][1] - found[1][1]).norm() / found[1][1].norm()) < 2e-2


def test_half_precision_around_the_correlation_changes_nothing():
    a, b = torch.randn(2, 1, 1, 10, 10, 10)
    with torch.autocast("cpu", torch.bfloat16):
        found = squared_lncc(a, b)
    assert torch.equal(found, squared_lncc(a, b)) and flow_gradient(torch.ones(1, 3, 2, 2, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_gradient_of_a_flow_equals_plain_loops():
    torch.manual_seed(0)
    flow = torch.randn(2, 3, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    means = []
    for axis in range(3):
        terms = []
        for sample, component, *place in np.ndindex(flow.shape):
            if place[axis] + 1 < flow.shape[axis + 2]:
                onward = [p + (i == axis) for i, p in enumerate(place)]
                terms.append((flow[(sample, component, *onward)] - flow[(sample, component, *place)]) ** 2)
        means.append(torch.stack(terms).mean())
    assert flow_gradient(flow).item() == pytest.approx((sum(means) / 3).item(), rel=1e-12)
    assert flow_gradient(torch.full((1, 3, 4, 4, 4), 7.0)).item() == 0


def test_gradients_are_those_of_differences():
    torch.manual_seed(0)
    a, b, flow = (torch.randn(1, channels, 3, 4, 5, dtype=torch.float64, requires_grad=True) for channels in (1, 1, 3))
    assert gradcheck(lambda x, y: squared_lncc(x, y, 3), (a, b)) and gradcheck(flow_gradient, (flow,))
