"""Assignments against plain loops in double precision; several processes are in test_distributed.py."""

import math

import pytest
import torch

from nnssl_ext.nn import assign


def cosines(n: int, classes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    z, directions = (torch.randn(count, 8, dtype=torch.float64, generator=generator) for count in (n, classes))
    return (z / z.norm(dim=1, keepdim=True)) @ (directions / directions.norm(dim=1, keepdim=True)).T


def plain_sinkhorn(logits: torch.Tensor, temperature: float, iterations: int = 3) -> torch.Tensor:
    """Not in the log domain: the matrix itself, its columns and rows divided in turn by their sums."""
    n, classes = logits.shape
    q = [[math.exp(logits[i, k].item() / temperature) for k in range(classes)] for i in range(n)]
    for _ in range(iterations):
        columns = [sum(q[i][k] for i in range(n)) for k in range(classes)]
        q = [[q[i][k] / columns[k] / classes for k in range(classes)] for i in range(n)]
        rows = [sum(q[i]) for i in range(n)]
        q = [[q[i][k] / rows[i] / n for k in range(classes)] for i in range(n)]
    return torch.tensor(q, dtype=torch.float64) * n


def log_sinkhorn(logits: torch.Tensor, temperature: float, iterations: int = 3) -> torch.Tensor:
    """The same with logarithms, for logits whose exponentials a double can't hold."""
    x = logits.double() / temperature
    for _ in range(iterations):
        x = x - x.logsumexp(0)
        x = x - x.logsumexp(1, keepdim=True)
    return x.exp()


def balanced(logits: torch.Tensor, temperature: float, iterations: int = 3) -> torch.Tensor:
    return assign.probabilities(logits, temperature, *assign.sinkhorn(logits, temperature, iterations))


@pytest.mark.parametrize("shape", [(9, 6), (5, 14), (1, 4)])
@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_sinkhorn_equals_the_plain_loop(shape, temperature, dtype, tolerance):
    logits = cosines(*shape).to(dtype)
    found = balanced(logits, temperature)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), plain_sinkhorn(logits.double(), temperature), rtol=tolerance, atol=0)


@pytest.mark.parametrize("iterations", [1, 3, 30])
def test_rows_sum_to_one_and_columns_approach_equal_sums(iterations):
    p = balanced(cosines(40, 8), 0.2, iterations)
    torch.testing.assert_close(p.sum(1), torch.ones(40, dtype=torch.float64), rtol=1e-12, atol=0)
    apart = (p.sum(0) * 8 / 40 - 1).abs().max().item()
    assert apart < {1: 1.0, 3: 0.1, 30: 1e-4}[iterations]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_whose_exponentials_overflow_give_the_same_as_with_logarithms(dtype):
    logits = (100 * torch.rand(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 50).to(dtype)
    logits[:, 3] -= 40  # a prototype that no vector is near: its sum underflows unless its own largest logit is known
    found = balanced(logits, 0.02)
    assert bool(found.isfinite().all())
    exponent = 10_000 * torch.finfo(dtype).eps  # of numbers as large as the logits over the temperature, relative error
    torch.testing.assert_close(found.double(), log_sinkhorn(logits, 0.02), rtol=exponent, atol=1e-30)


def test_a_prototype_that_all_vectors_prefer_is_balanced_and_wins_everything_without():
    logits = 0.1 * cosines(32, 8)
    logits[:, 2] += 0.8
    plain, even = (assign.probabilities(logits, 0.1, *how(logits, 0.1)).mean(0) for how in (assign.softmax, assign.sinkhorn))
    assert plain[2] > 0.95 and even.max() < 0.14


@pytest.mark.parametrize("centred", [False, True])
def test_softmax_equals_the_plain_loop_with_and_without_a_centre(centred):
    logits = cosines(5, 7)
    centre = assign.Centre(7).double()
    if centred:
        centre.value.copy_(cosines(1, 7, seed=1)[0])
    found = assign.probabilities(logits, 0.05, *(centre.potentials(logits, 0.05) if centred else assign.softmax(logits, 0.05)))
    for i in range(5):
        e = [math.exp((logits[i, k] - centre.value[k]).item() / 0.05) for k in range(7)]
        assert found[i].tolist() == pytest.approx([value / sum(e) for value in e], rel=1e-10)


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
@pytest.mark.parametrize("how", [assign.sinkhorn, assign.softmax])
def test_the_number_of_rows_computed_at_once_changes_nothing(rows, how, monkeypatch):
    logits = cosines(11, 6)
    whole = how(logits, 0.05)
    monkeypatch.setattr(assign, "ELEMENTS", 6 * rows)
    assert [part.stop - part.start for part in assign.chunks(11, 6, logits.device)] == [min(rows, 11 - start) for start in range(0, 11, rows)]
    for found, expected in zip(how(logits, 0.05), whole):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    targets = assign.targets(logits, 0.05, *whole)
    parts = torch.cat([targets(part).clone() for part in assign.chunks(11, 6, logits.device)])
    assert torch.equal(parts, assign.probabilities(logits, 0.05, *whole))


def test_a_row_wider_than_what_is_computed_at_once_is_still_computed(monkeypatch):
    monkeypatch.setattr(assign, "ELEMENTS", 3)
    assert len(list(assign.chunks(4, 7, torch.device("cpu")))) == 4


@pytest.mark.parametrize("how", [assign.sinkhorn, assign.softmax, assign.Centre(6).potentials])
def test_no_vectors_have_finite_potentials_and_no_probabilities(how):
    row, column = how(torch.zeros(0, 6), 0.05)
    assert row.shape == (0,) and bool(column.isfinite().all())
    assert assign.probabilities(torch.zeros(0, 6), 0.05, row, column).shape == (0, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", [assign.sinkhorn, assign.softmax])
def test_logits_in_half_precision_are_assigned_in_single_precision(dtype, how):
    logits = cosines(9, 6).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row, column = how(logits, 0.05)
        found = assign.probabilities(logits, 0.05, row, column)
    assert found.dtype == row.dtype == column.dtype == torch.float32
    torch.testing.assert_close(found, assign.probabilities(logits.float(), 0.05, *how(logits.float(), 0.05)), rtol=1e-5, atol=0)


def test_the_centre_moves_once_per_step_by_the_mean_of_all_its_batches():
    centre = assign.Centre(4, momentum=0.9)
    batches = [torch.randn(count, 4) for count in (3, 5, 2, 4)]
    expected = [0.0] * 4
    for step in ((0, 1), (2, 3)):
        vectors = [row.tolist() for number in step for row in batches[number]]
        for number in step:
            before = centre.value.clone()
            centre.add(batches[number])
            assert torch.equal(centre.value, before)
        centre.update()
        expected = [0.9 * value + 0.1 * sum(vector[k] for vector in vectors) / len(vectors) for k, value in enumerate(expected)]
        assert centre.value.tolist() == pytest.approx(expected, rel=1e-5)
    centre.update()  # nothing was collected
    assert centre.value.tolist() == pytest.approx(expected, rel=1e-5)
    assert float(centre.sum.abs().sum()) == float(centre.count) == 0


def test_the_whole_state_of_a_centre_is_in_buffers_that_are_changed_in_place():
    centre = assign.Centre(4)
    centre.add(torch.ones(2, 4))
    buffers = list(centre.buffers())
    before = [buffer.clone() for buffer in buffers]
    centre.add(torch.randn(3, 4).bfloat16())
    centre.update()
    assert all(buffer is former for buffer, former in zip(centre.buffers(), buffers))
    assert all(not torch.equal(buffer, former) for buffer, former in zip(buffers, before))
    for buffer, former in zip(buffers, before):
        buffer.copy_(former)  # what the loop does when it skips a step
    centre.update()
    assert centre.value.tolist() == pytest.approx([0.1] * 4)
    assert set(centre.state_dict()) == {"value", "sum", "count"} and not list(centre.parameters())
