"""Negative cosine: its value, and that nothing flows back through the target."""

import math

import pytest
import torch

from nnssl_ext.nn.cosine import negative_cosine


def test_it_is_the_mean_over_the_vectors_of_a_plain_loop():
    torch.manual_seed(0)
    p, z = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    terms = []
    for a, b in zip(p.tolist(), z.tolist()):
        inner, aa, bb = (sum(x * y for x, y in zip(*pair)) for pair in ((a, b), (a, a), (b, b)))
        terms.append(-inner / math.sqrt(aa * bb))
    assert negative_cosine(p, z).item() == pytest.approx(sum(terms) / 5, rel=1e-12)


def test_equal_directions_cost_minus_one_opposite_ones_one_orthogonal_ones_and_zeros_nothing():
    x = torch.eye(3)
    assert [negative_cosine(x, z).item() for z in (4 * x, -x, x.roll(1, 0), 0 * x)] == [-1, 1, 0, 0]


def test_no_gradient_flows_through_the_target():
    p, z = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    negative_cosine(p, z).backward()
    assert z.grad is None and p.grad.any()


def test_it_is_in_single_precision_under_autocast_and_finite_for_zeros():
    p = torch.zeros(4, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = negative_cosine(p.bfloat16(), torch.ones(4, 3, dtype=torch.bfloat16))
    loss.backward()
    assert loss.dtype == torch.float32 and bool(p.grad.isfinite().all())
