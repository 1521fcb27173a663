"""NT-Xent against its formula, at every temperature and with subjects."""

import math

import pytest
import torch

from nnssl_ext.nn.contrastive import nt_xent


def plain(a, b, temperature, subjects):
    """One pair after the other; a sample's own vectors have one subject of their own where `subjects` is None."""
    vectors = [row / row.norm() for row in (*a, *b)]
    count, subjects = len(a), list(subjects or range(len(a)))
    terms = []
    for i, anchor in enumerate(vectors):
        positive = (anchor @ vectors[(i + count) % (2 * count)] / temperature).exp()
        total = positive
        for k, vector in enumerate(vectors):
            if subjects[k % count] != subjects[i % count]:
                total = total + (anchor @ vector / temperature).exp()
        terms.append(-(positive / total).log())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("subjects", [None, [0, 1, 2, 3, 4], [7, 7, 3, 7, 3]], ids=str)
@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
def test_the_loss_and_its_gradients_are_those_of_a_plain_loop(temperature, subjects):
    torch.manual_seed(0)
    a, b = (torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found, expected = nt_xent(a, b, temperature, subjects), plain(a, b, temperature, subjects)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for one, other in zip(torch.autograd.grad(found, (a, b)), torch.autograd.grad(expected, (a, b))):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_equal_vectors_cost_the_logarithm_of_all_others(count):
    ones = torch.ones(count, 4)
    assert nt_xent(ones, ones, 0.1).item() == pytest.approx(math.log(2 * count - 1), rel=1e-6)


def test_four_orthogonal_pairs_at_temperature_one_half():
    pairs = torch.eye(4)
    assert nt_xent(pairs, pairs, 0.5).item() == pytest.approx(0.59444, abs=5e-6)  # log(1 + 6 exp(-2))


def test_lengths_do_not_count():
    a, b = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    assert nt_xent(a * torch.rand(4, 1).double(), 7 * b, 0.5).item() == pytest.approx(nt_xent(a, b, 0.5).item(), rel=1e-12)


def test_the_loss_and_its_gradients_are_finite_at_a_temperature_at_which_exponentials_are_not():
    torch.manual_seed(0)
    a = torch.randn(4, 50, requires_grad=True)
    b = (-a.detach() + 0.1 * torch.randn(4, 50)).requires_grad_()  # the worst case: positives are opposite
    assert not torch.exp(torch.tensor(1.0) / 0.005).isfinite()
    loss = nt_xent(a, b, 0.005)
    loss.backward()
    assert bool(loss.isfinite()) and loss > 100
    assert all(bool(x.grad.isfinite().all()) and bool(x.grad.any()) for x in (a, b))


def test_half_precision_is_widened_and_a_vector_of_zeros_is_no_obstacle():
    a = torch.randn(3, 8).to(torch.bfloat16)
    a[0] = 0
    a.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(a, a.detach().flip(1), 0.005)
    loss.backward()
    assert loss.dtype == torch.float32 and bool(loss.isfinite()) and bool(a.grad.isfinite().all())


@pytest.mark.parametrize("subjects", [[1], [5, 5, 5]], ids=str)
def test_one_sample_or_one_subject_alone_costs_nothing_and_pulls_nowhere(subjects):
    a = torch.randn(len(subjects), 8, requires_grad=True)
    loss = nt_xent(a, torch.randn(len(subjects), 8), 0.5, subjects)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6) and bool((a.grad.abs() < 1e-6).all())


def test_samples_of_the_same_subject_do_not_repel_each_other():
    torch.manual_seed(0)
    a, b = torch.randn(3, 8), torch.randn(3, 8)
    moved = torch.stack((a[0], a[0], a[2]))  # sample 1 becomes as sample 0
    assert nt_xent(moved, b, 0.1, [0, 0, 1]) != nt_xent(moved, b, 0.1)
    third = moved[2:].clone().requires_grad_()
    nt_xent(torch.cat((moved[:2], third)), b, 0.1, [4, 9, 9])[None].sum().backward()
    expected = torch.autograd.grad(plain([*moved[:2], third[0]], b, 0.1, [4, 9, 9]), third)[0]
    torch.testing.assert_close(third.grad, expected)
