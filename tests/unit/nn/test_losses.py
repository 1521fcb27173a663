"""Losses against plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nnssl_ext.nn import assign
from nnssl_ext.nn.losses import cross_entropy_to, dino_loss, gram_loss, ibot_loss, ibot_weights, koleo, masked_l1, masked_mse

PRECISIONS = [(torch.float64, 1e-6), (torch.float32, 1e-5)]


def vectors(*shape: int, seed: int = 0) -> Tensor:
    """Unit vectors in double precision."""
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def distributions(*shape: int, seed: int = 0) -> Tensor:
    return (3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def plain_cross_entropy(z: Tensor, directions: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Of one vector (D,), with a graph."""
    logits = [sum(a * b for a, b in zip(z, direction)) / temperature for direction in directions]
    log_sum = torch.log(sum(torch.exp(logit) for logit in logits))
    return -sum(p * (logit - log_sum) for p, logit in zip(target, logits))


def gradients(loss, *inputs: Tensor) -> list[Tensor]:
    """The loss and its gradients by the inputs, in double precision."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    return [value.detach().double(), *(gradient.double() for gradient in torch.autograd.grad(value, leaves))]


def same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize(("loss", "power"), [(masked_mse, 2), (masked_l1, 1)])
@pytest.mark.parametrize("channels", [1, 4])
def test_masked_errors_equal_the_plain_loop(channels, loss, power):
    prediction, target = torch.randn(2, 2, channels, 3, 4, 5, dtype=torch.float64)
    hidden = torch.rand(2, 1, 3, 4, 5) < 0.6
    errors = [
        abs(prediction[b, c, z, y, x] - target[b, c, z, y, x]) ** power
        for b in range(2) for c in range(channels) for z in range(3) for y in range(4) for x in range(5) if hidden[b, 0, z, y, x]
    ]  # fmt: skip
    assert loss(prediction, target, hidden).item() == pytest.approx((sum(errors) / len(errors)).item(), rel=1e-12)


@pytest.mark.parametrize("masked", [masked_mse, masked_l1])
def test_visible_outputs_get_no_gradient_even_when_they_are_not_finite(masked):
    prediction = torch.randn(1, 2, 4, 4, 4)
    hidden = torch.rand(1, 1, 4, 4, 4) < 0.5
    prediction = torch.where(hidden, prediction, torch.nan).requires_grad_()
    loss = masked(prediction, torch.zeros(1, 2, 4, 4, 4), hidden)
    loss.backward()
    assert torch.isfinite(loss)
    assert bool((prediction.grad[~hidden.expand_as(prediction)] == 0).all())
    assert bool((prediction.grad[hidden.expand_as(prediction)] != 0).all())


def test_half_precision_is_accumulated_in_single_precision():
    prediction, target = torch.full((1, 1, 64, 64, 64), 300.0, dtype=torch.float16), torch.zeros(1, 1, 64, 64, 64, dtype=torch.float16)
    assert masked_mse(prediction, target, torch.ones(1, 1, 64, 64, 64, dtype=torch.bool)).item() == pytest.approx(90000.0)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_cross_entropy_and_its_gradients_equal_the_plain_loop_whatever_is_computed_at_once(dtype, tolerance, rows, monkeypatch):
    monkeypatch.setattr(assign, "ELEMENTS", rows * 9)
    z, directions, targets, weights = vectors(5, 4), vectors(9, 4, seed=1), 1.7 * distributions(5, 9), torch.rand(5, dtype=torch.float64)

    def plain(z, directions):
        return sum(w * plain_cross_entropy(*row, 0.1) for w, *row in zip(weights, z, [directions] * 5, targets))

    def chunked(z, directions):
        return cross_entropy_to(z, directions, lambda part: targets[part].to(dtype), weights.to(dtype), 0.1)

    same(gradients(chunked, z.to(dtype), directions.to(dtype)), gradients(plain, z, directions), tolerance)


def test_cross_entropy_passes_the_numerical_check_of_its_gradients(monkeypatch):
    monkeypatch.setattr(assign, "ELEMENTS", 2 * 6)
    z, directions = (3 * vectors(5, 4)).requires_grad_(), (2 * vectors(6, 4, seed=1)).requires_grad_()
    targets, weights = distributions(5, 6), torch.tensor([0.5, 0.0, 2.0, 1.0, 0.1], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: 3 * cross_entropy_to(*x, lambda rows: targets[rows], weights, 0.3), (z, directions))


@pytest.mark.parametrize("trained", ["z", "directions", "neither"])
def test_only_the_gradients_that_are_needed_are_computed(trained):
    z, directions, targets = vectors(6, 4), vectors(10, 4, seed=1), distributions(6, 10)
    for name, x in (("z", z), ("directions", directions)):
        x.requires_grad_(name == trained)
    with FlopCounterMode(display=False) as counter:
        loss = cross_entropy_to(z, directions, lambda rows: targets[rows], torch.ones(6))
        if trained != "neither":
            loss.backward()
    assert counter.get_total_flops() == (1 if trained == "neither" else 2) * 2 * 6 * 10 * 4
    assert [x.grad is not None for x in (z, directions)] == [trained == "z", trained == "directions"]


def test_a_step_costs_three_matrix_products_and_without_gradients_one():
    z, directions, targets = vectors(6, 4).requires_grad_(), vectors(10, 4, seed=1).requires_grad_(), distributions(6, 10)
    with FlopCounterMode(display=False) as counter:
        cross_entropy_to(z, directions, lambda rows: targets[rows], torch.ones(6)).backward()
    assert counter.get_total_flops() == 3 * 2 * 6 * 10 * 4
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert not cross_entropy_to(z, directions, lambda rows: targets[rows], torch.ones(6)).requires_grad
    assert counter.get_total_flops() == 2 * 6 * 10 * 4


def test_no_matrix_of_all_vectors_and_prototypes_is_ever_made(monkeypatch):
    monkeypatch.setattr(assign, "ELEMENTS", 4 * 50)
    z, directions, logits = vectors(40, 3).requires_grad_(), vectors(50, 3, seed=1).requires_grad_(), vectors(40, 3) @ vectors(50, 3, seed=2).T
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            own = isinstance(found, Tensor) and found.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr()
            sizes.append(found.numel() if own else 0)
            return found

    with Sizes():
        cross_entropy_to(z, directions, assign.targets(logits, 0.05, *assign.sinkhorn(logits, 0.05)), torch.ones(40)).backward()
    assert max(sizes) == 4 * 50


@pytest.mark.parametrize("autocast", [False, True])
def test_no_vectors_have_a_loss_of_zero_and_gradients_of_zeros(autocast):
    z, directions = torch.zeros(0, 4, requires_grad=True), vectors(10, 4).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = cross_entropy_to(z, directions, lambda rows: torch.zeros(0, 10), torch.zeros(0))
    loss.backward()
    assert loss.item() == 0 and z.grad.shape == (0, 4) and bool((directions.grad == 0).all())


def test_targets_are_left_as_they_were_and_may_be_written_over_by_the_next(monkeypatch):
    monkeypatch.setattr(assign, "ELEMENTS", 2 * 10)
    z, directions, targets, buffer = vectors(6, 4), vectors(10, 4, seed=1), distributions(6, 10), torch.empty(2, 10, dtype=torch.float64)
    before = targets.clone()
    fresh = gradients(lambda *x: cross_entropy_to(*x, lambda rows: targets[rows], torch.ones(6)), z, directions)
    reused = gradients(lambda *x: cross_entropy_to(*x, lambda rows: buffer.copy_(targets[rows]), torch.ones(6)), z, directions)
    assert torch.equal(targets, before)
    assert all(torch.equal(a, b) for a, b in zip(fresh, reused))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_under_autocast_loss_and_gradients_are_close_and_in_single_precision(kind):
    z, directions, targets = vectors(64, 32).float(), vectors(500, 32, seed=1).float(), distributions(64, 500).float()
    weights = torch.full((64,), 1e-7)  # its products vanish in half precision

    def loss(z, directions):
        return cross_entropy_to(z, directions, lambda rows: targets[rows], weights)

    expected = gradients(loss, z, directions)
    with torch.autocast("cpu", dtype=kind):
        assert loss(z, directions).dtype == torch.float32
        found = gradients(loss, z, directions)
    assert not torch.equal(found[1], expected[1])
    for one, other in zip(found, expected):
        assert float((one - other).norm() / other.norm()) < 2e-2


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_under_autocast_the_softmax_is_in_single_precision(kind):
    z, target = torch.tensor([[0.25, 0.0]]), torch.tensor([[1.0, 0.0]])  # logits 2 and 0, without rounding
    with torch.autocast("cpu", dtype=kind):
        found = cross_entropy_to(z, torch.eye(2), lambda rows: target[rows], torch.ones(1), 0.125)
    assert found.item() == pytest.approx(math.log1p(math.exp(-2)), rel=1e-5)


def test_logits_far_apart_neither_overflow_nor_vanish():
    z, directions = (torch.eye(3) * 100).requires_grad_(), torch.eye(3, requires_grad=True)
    target = torch.tensor([[0.0, 1.0, 0.0]] * 3)
    loss = cross_entropy_to(z, directions, lambda rows: target[rows], torch.ones(3), 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(2000)
    assert bool(z.grad.isfinite().all()) and bool(directions.grad.isfinite().all())


def test_what_is_not_finite_is_not_hidden_so_that_the_step_is_skipped():
    z, directions, target = vectors(3, 4).requires_grad_(), vectors(5, 4).requires_grad_(), distributions(3, 5)
    poisoned = torch.where(torch.arange(3)[:, None] == 1, torch.nan, z)
    loss = cross_entropy_to(poisoned, directions, lambda rows: target[rows], torch.ones(3))
    loss.backward()
    assert bool(loss.isnan()) and bool(directions.grad.isnan().any())


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("local", [0, 1, 3])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_dino_is_the_mean_over_pairs_of_a_global_view_of_the_teacher_and_another_one_of_the_student(dtype, tolerance, local, rows, monkeypatch):
    monkeypatch.setattr(assign, "ELEMENTS", rows * 7)
    samples, views = 2, 2 + local
    z, directions, p = vectors(views, samples, 4), vectors(7, 4, seed=1), distributions(2, samples, 7)

    def plain(z, directions):
        pairs = [(i, j) for i in range(2) for j in range(views) if i != j]
        assert len(pairs) == 2 + 2 * local
        terms = [sum(plain_cross_entropy(z[j, b], directions, p[i, b], 0.1) for b in range(samples)) / samples for i, j in pairs]
        return sum(terms) / len(pairs)

    def ours(z, directions):
        return dino_loss(z.flatten(0, 1), directions, p.to(dtype), 0.1)

    same(gradients(ours, z.to(dtype), directions.to(dtype)), gradients(plain, z, directions), tolerance)


MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)  # 3, 0, 1, 5 of 5 tokens


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_ibot_is_the_mean_over_all_crops_of_the_mean_over_their_hidden_tokens(dtype, tolerance):
    crops, tokens = MASK.shape
    z, directions, logits = vectors(crops, tokens, 4), vectors(7, 4, seed=1), vectors(crops, tokens, 4, seed=2) @ vectors(7, 4, seed=3).T
    hidden = MASK.flatten().nonzero()[:, 0]
    told = logits.flatten(0, 1)[hidden]
    potentials = assign.sinkhorn(told, 0.05)
    p = torch.zeros(crops * tokens, 7, dtype=torch.float64)
    p[hidden] = assign.probabilities(told, 0.05, *potentials)
    p = p.reshape(crops, tokens, 7)

    def plain(z, directions):
        total = torch.zeros((), dtype=torch.float64)
        for b in range(crops):
            found = [plain_cross_entropy(z[b, i], directions, p[b, i], 0.1) for i in range(tokens) if MASK[b, i]]
            total = total + (sum(found) / len(found) if found else 0)
        return total / crops

    def ours(z, directions):
        targets = assign.targets(told.to(dtype), 0.05, *(x.to(dtype) for x in potentials))
        return ibot_loss(z.flatten(0, 1)[hidden], directions, targets, ibot_weights(MASK, hidden), 0.1)

    found, expected = gradients(ours, z.to(dtype), directions.to(dtype)), gradients(plain, z, directions)
    same(found, expected, max(tolerance, 1e-6))
    assert bool((found[1][~MASK] == 0).all()) and bool((found[1][MASK].abs().amax(1) > 0).all())


def test_weights_of_a_crop_sum_to_one_over_all_crops_however_many_of_its_tokens_are_hidden():
    weights, crop = ibot_weights(MASK, MASK.flatten().nonzero()[:, 0]), MASK.nonzero()[:, 0]
    assert [weights[crop == b].sum().item() for b in range(4)] == pytest.approx([0.25, 0, 0.25, 0.25])


def test_hiding_a_samples_tokens_twice_leaves_its_weight_and_those_of_the_others():
    more = torch.cat((MASK, MASK & (torch.arange(4)[:, None] == 2)), dim=1)  # crop 2: each hidden token once more
    weights, crop = ibot_weights(more, more.flatten().nonzero()[:, 0]), more.nonzero()[:, 0]
    assert weights[crop == 2].tolist() == pytest.approx([1 / 8, 1 / 8])
    assert weights[crop == 0].tolist() == pytest.approx([1 / 12] * 3)
    assert weights[crop == 3].tolist() == pytest.approx([1 / 20] * 5)


def test_without_any_hidden_token_there_are_no_weights():
    assert ibot_weights(torch.zeros(4, 5, dtype=torch.bool), torch.zeros(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("n", [2, 3, 9])
def test_koleo_equals_the_plain_loop(n, dtype, tolerance):
    x = torch.randn(n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(n))

    def plain(x):
        rows = [row / row.square().sum().sqrt() for row in x]
        total = 0.0
        for i in range(n):
            apart = [(rows[i] - rows[j]).square().sum().sqrt() for j in range(n) if j != i]
            total = total + torch.log(torch.stack(apart).min() + 1e-8)
        return -total / n

    same(gradients(koleo, x.to(dtype)), gradients(plain, x), tolerance)


def test_koleo_of_identical_vectors_has_a_finite_loss_and_finite_gradients():
    x = torch.randn(1, 5).repeat(4, 1).requires_grad_()
    loss = koleo(x)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(2e-8), rel=1e-5) and bool((x.grad == 0).all())
    x = (torch.randn(1, 5).repeat(4, 1) + 1e-7 * torch.randn(4, 5)).requires_grad_()
    koleo(x).backward()
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("n", [0, 1])
def test_koleo_of_fewer_than_two_vectors_is_zero_with_gradients_of_zeros(n):
    x = torch.randn(n, 5, requires_grad=True)
    loss = koleo(x)
    loss.backward()
    assert loss.item() == 0 and bool((x.grad == 0).all())


def test_koleo_is_computed_in_single_precision_under_autocast():
    x = torch.randn(8, 32)
    x[1::2] = x[::2] + 1e-3 * torch.randn(4, 32)  # nearest neighbours that bfloat16 can't tell apart
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert koleo(x).item() == pytest.approx(koleo(x.double()).item(), rel=1e-4)
        assert koleo(nn.Linear(32, 32)(x)).dtype == torch.float32


def test_koleo_pushes_nearest_neighbours_apart():
    x = (torch.randn(1, 8) + 0.1 * torch.randn(12, 8)).requires_grad_()
    before = koleo(x).item()
    for _ in range(20):
        (gradient,) = torch.autograd.grad(koleo(x), x)
        x = (x - 0.1 * gradient).detach().requires_grad_()
    assert koleo(x).item() < before - 0.1


def gram_in_loops(student, teacher, index):
    """Mean over crops and ordered pairs of their tokens of the squared difference of cosines."""
    terms = []
    for crop, tokens in enumerate(index.tolist()):
        for i in tokens:
            for j in tokens:
                cosines = [
                    sum(a * b for a, b in zip(x[i], x[j])) / (sum(a * a for a in x[i]) * sum(b * b for b in x[j])).sqrt()
                    for x in (student[crop], teacher[crop])
                ]
                terms.append((cosines[0] - cosines[1]) ** 2)
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_gram_loss_equals_plain_loops(kind, tolerance):
    student = torch.randn(2, 7, 5, dtype=kind).requires_grad_()
    teacher = torch.randn(2, 7, 3, dtype=kind)  # its width is its own
    index = torch.stack([torch.randperm(7)[:4] for _ in range(2)])
    mine, theirs = gram_loss(student, teacher, index), gram_in_loops(student, teacher, index)
    assert mine.dtype == kind and mine.item() == pytest.approx(theirs.item(), rel=tolerance)
    (one,), (two,) = torch.autograd.grad(mine, student), torch.autograd.grad(theirs, student)
    assert one.norm() > 0 and (one - two).norm() <= 10 * tolerance * two.norm()


def test_gram_loss_does_not_see_lengths_rotations_or_tokens_that_are_not_asked_for():
    tokens, index = torch.randn(2, 9, 6, dtype=torch.float64), torch.tensor([[0, 3, 5], [1, 2, 8]])
    turned = tokens @ torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0] * torch.rand(2, 9, 1, dtype=torch.float64).add(0.1)
    assert gram_loss(turned, tokens, index).item() == pytest.approx(0, abs=1e-20)
    turned[0, 4], turned[1, 0] = float("nan"), float("nan")
    assert gram_loss(turned, tokens, index).item() == pytest.approx(0, abs=1e-20)


def test_gram_loss_does_not_grow_with_the_number_of_tokens_and_is_in_single_precision_under_autocast():
    student, teacher = torch.randn(1, 512, 64), torch.randn(1, 512, 64)
    few, many = (gram_loss(student, teacher, torch.arange(n)[None]).item() for n in (128, 512))
    assert few == pytest.approx(many, rel=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gram_loss(student, teacher, torch.arange(512)[None]).item() == pytest.approx(many, rel=1e-4)
