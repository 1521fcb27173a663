"""Losses and their gradients equal those of lightly, an independent implementation, in double precision."""

import pytest
import torch
import torch.nn.functional as F

from nnssl_ext.nn import assign
from nnssl_ext.nn.contrastive import nt_xent
from nnssl_ext.nn.cosine import negative_cosine
from nnssl_ext.nn.heads import ProjectionHead
from nnssl_ext.nn.losses import dino_loss, ibot_loss, ibot_weights, koleo

lightly = pytest.importorskip("lightly.loss")

TEMPERATURES = (0.04, 0.1)  # of teacher and student
B, LOCALS, D, K = 5, 3, 8, 12  # volumes, local views, width of the sphere, prototypes


def vectors(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def same(found, expected, *inputs):
    """Values and gradients. Temperatures of lightly's teacher are single precision: 4e-8 apart, hence 1e-6 and no less."""
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(*(torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (found, expected))):
        assert bool(ours.any())
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * theirs.abs().max().item())


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("count", [2, 9])
def test_nt_xent(temperature, count):
    a, b = vectors(count, D), vectors(count, D, seed=1)
    same(nt_xent(a, b, temperature), lightly.NTXentLoss(temperature)(a, b), a, b)


def test_negative_cosine():
    p, z = vectors(B, D), vectors(B, D, seed=1)
    same(negative_cosine(p, z), lightly.NegativeCosineSimilarity()(p, z.detach()), p)  # ours stops the gradient itself


@pytest.mark.parametrize("count", [2, 20])
def test_koleo(count):
    x = vectors(count, D)
    same(koleo(x), lightly.KoLeoLoss()(x), x)  # its distances are of x - y + 1e-8, ours of x - y: the same far beyond 1e-6


@pytest.fixture
def head():
    torch.manual_seed(0)
    return ProjectionHead(D, 16, D, K).double()


def test_dino_with_a_centre_that_moves_over_steps(head):
    """Theirs compares logits; ours vectors and directions. Theirs moves the centre within the loss, ours once per step."""
    centre, theirs = assign.Centre(K).double(), lightly.DINOLoss(K, student_temp=TEMPERATURES[1]).double()
    for step in range(3):
        x = vectors((2 + LOCALS) * B, D, seed=step)
        z, directions = head(x), head.directions()
        seen = 0.5 * vectors(2 * B, K, seed=10 + step).detach() + torch.linspace(0, 1, K)
        p = assign.probabilities(seen, TEMPERATURES[0], *centre.potentials(seen, TEMPERATURES[0])).unflatten(0, (2, B))
        centre.add(seen)
        expected = theirs(list(seen.chunk(2)), list((z @ directions.T).chunk(2 + LOCALS)), teacher_temp=TEMPERATURES[0])
        same(dino_loss(z, directions, p, TEMPERATURES[1]), expected, x, head.prototypes)
        centre.update()
        torch.testing.assert_close(centre.value, theirs.center.flatten(), rtol=1e-12, atol=1e-12)
    assert centre.value.abs().max() > 0.1


def test_ibot_with_a_centre_and_a_crop_without_hidden_tokens(head):
    """Theirs has masks of slices and counts such a crop as ours does; its centre takes the hidden tokens alone."""
    mask = torch.rand(4, 3, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[2] = False
    hidden = mask.flatten().nonzero().flatten()
    centre, theirs = assign.Centre(K).double(), lightly.IBOTPatchLoss(K, student_temp=TEMPERATURES[1]).double()
    for step in range(3):
        x, told = vectors(len(hidden), D, seed=step), vectors(len(hidden), K, seed=10 + step).detach() + torch.linspace(0, 1, K)
        z, directions = head(x), head.directions()
        targets = assign.targets(told, TEMPERATURES[0], *centre.potentials(told, TEMPERATURES[0]))
        centre.add(told)
        expected = theirs(told, z @ directions.T, mask, teacher_temp=TEMPERATURES[0])
        same(ibot_loss(z, directions, targets, ibot_weights(mask.flatten(1), hidden), TEMPERATURES[1]), expected, x, head.prototypes)
        centre.update()
        torch.testing.assert_close(centre.value, theirs.center.value.flatten(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_swapped_prediction_of_codes(head, iterations):
    """Theirs balances each large view by itself, and its loss is the mean over the same pairs of views as in `dino_loss`."""
    x = vectors((2 + LOCALS) * B, D)
    z, directions = head(x), head.directions()
    cosines = (z @ directions.T).chunk(2 + LOCALS)
    codes = [assign.probabilities(c.detach(), 0.05, *assign.sinkhorn(c.detach(), 0.05, iterations)) for c in cosines[:2]]
    theirs = lightly.SwaVLoss(TEMPERATURES[1], iterations, 0.05)
    same(dino_loss(z, directions, torch.stack(codes), TEMPERATURES[1]), theirs(list(cosines[:2]), list(cosines[2:])), x, head.prototypes)


def test_sinkhorn(head):
    logits = F.normalize(vectors(7, D), dim=1).detach() @ head.directions().detach().T
    expected = pytest.importorskip("lightly.loss.swav_loss").sinkhorn(logits, 3, 0.05)
    torch.testing.assert_close(assign.probabilities(logits, 0.05, *assign.sinkhorn(logits, 0.05)), expected, rtol=1e-10, atol=0)
