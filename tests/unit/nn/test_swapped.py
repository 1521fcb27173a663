"""Swapped prediction against plain loops in double precision, and what goes wrong where it is computed otherwise."""

import math

import pytest
import torch
import torch.nn.functional as F

from nnssl_ext.nn import assign
from nnssl_ext.nn.swapped import swapped_prediction

N, K = 9, 5


def unit(count, seed, dtype=torch.float64):
    return F.normalize(torch.randn(count, 6, dtype=dtype, generator=torch.Generator().manual_seed(seed)), dim=1)


def plain(first, second, directions, temperature, sharpness):
    """The matrix of assignments itself, its columns and rows divided in turn by their sums; then one product after the other."""
    losses = []
    for one, other in ((first, second), (second, first)):
        q = [[math.exp(float(vector @ direction) / sharpness) for direction in directions.detach()] for vector in other.detach()]
        for _ in range(3):
            columns = [sum(row[k] for row in q) for k in range(K)]
            q = [[row[k] / columns[k] for k in range(K)] for row in q]
            q = [[share / sum(row) for share in row] for row in q]
        for vector, targets in zip(one, q):
            exponentials = [torch.exp(vector @ direction / temperature) for direction in directions]
            losses.append(-sum(target * torch.log(e / sum(exponentials)) for target, e in zip(targets, exponentials)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperatures", [(0.1, 0.05), (0.5, 1.0)])
def test_the_loss_and_its_gradients_equal_plain_loops(temperatures):
    inputs = [unit(count, seed).requires_grad_() for count, seed in ((N, 0), (N, 1), (K, 2))]
    found, expected = swapped_prediction(*inputs, *temperatures), plain(*inputs, *temperatures)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for mine, theirs in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)):
        assert theirs.abs().max() > 0.01
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_equal_scores_are_shared_equally_over_the_prototypes_and_cost_the_logarithm_of_their_number():
    zeros = torch.zeros(N, K)
    assert torch.allclose(assign.probabilities(zeros, 0.05, *assign.sinkhorn(zeros, 0.05)), torch.full((N, K), 1 / K), rtol=1e-6)
    flat = torch.eye(6)[:1].expand(N, -1)  # orthogonal to all prototypes
    assert swapped_prediction(flat, flat, torch.eye(6)[1:]).item() == pytest.approx(math.log(K), rel=1e-6)


def test_a_vector_is_predicted_from_the_same_place_of_the_other_view_and_not_from_its_own():
    first = torch.eye(6)[[0, 1, 2, 3, 4]]
    same, shifted = (swapped_prediction(first, first.roll(shift, 0), torch.eye(6)[:5]).item() for shift in (0, 1))
    assert same < 1e-3 and shifted == pytest.approx(10, rel=1e-3)  # 1 / temperature


def test_probabilities_that_underflow_cost_a_finite_amount():
    first = torch.eye(6)[[0, 1, 2, 3, 4]]
    turned = first.roll(1, 0)
    assert (first @ torch.eye(6)[:5].T / 1e-3).softmax(1).log().isinf().any()  # where the logarithm is taken afterwards
    vectors = turned.requires_grad_()
    loss = swapped_prediction(first, vectors, torch.eye(6)[:5], 1e-3, 0.05)
    loss.backward()
    assert loss.item() == pytest.approx(1000, rel=1e-3) and vectors.grad.isfinite().all()


def test_half_precision_around_it_changes_nothing():
    inputs = [unit(count, seed, torch.float32) for count, seed in ((N, 0), (N, 1), (K, 2))]
    with torch.autocast("cpu", torch.bfloat16):
        inside = swapped_prediction(*inputs)
    assert inside.dtype == torch.float32 and inside == swapped_prediction(*inputs)


def test_a_single_prototype_for_everything_is_no_solution_but_with_assignments_that_nothing_balances(monkeypatch):
    collapsed = torch.eye(6)[:1].expand(N, -1)
    assert swapped_prediction(collapsed, collapsed, torch.eye(6)[:K]).item() > 5
    monkeypatch.setattr(assign, "sinkhorn", assign.softmax)
    assert swapped_prediction(collapsed, collapsed, torch.eye(6)[:K]).item() < 0.01
