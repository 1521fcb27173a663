"""Losses of segmentations against plain loops and against PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from nnssl_ext.nn.segmentation_losses import cross_entropy, dice_ce


def plain(logits, target):
    """Voxel by voxel."""
    (count, classes), logs, means = logits.shape[:2], [], []
    for b in range(count):
        scores, truth = logits[b].flatten(1).T, target[b].flatten().tolist()
        shares = [[torch.exp(s) / sum(torch.exp(t) for t in row) for s in row] for row in scores]
        logs += [torch.log(share[k]) for share, k in zip(shares, truth)]
        dices = []
        for k in range(classes):
            if k in truth:
                hit, said = sum(share[k] for share, t in zip(shares, truth) if t == k), sum(share[k] for share in shares)
                dices.append(2 * hit / (said + truth.count(k)))
        means.append(sum(dices) / len(dices))
    return -sum(logs) / len(logs) + 1 - sum(means) / len(means)


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_gradient_equal_plain_loops_also_where_classes_are_missing(kind, tolerance):
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4, 2, 3, 4, dtype=torch.float64), torch.randint(0, 4, (3, 2, 3, 4))
    target[1], target[2] = 2, target[2].clamp(1, 2)
    mine, theirs = logits.to(kind, copy=True).requires_grad_(), logits.clone().requires_grad_()
    found, expected = dice_ce(mine, target), plain(theirs, target)
    found.backward()
    expected.backward()
    assert found.dtype == kind and found.item() == pytest.approx(expected.item(), rel=tolerance)
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)


def test_the_cross_entropy_is_pytorchs():
    logits, target = torch.randn(2, 5, 4, 4, 4, dtype=torch.float64), torch.randint(0, 5, (2, 4, 4, 4))
    p, dices = logits.softmax(1), []
    for b in range(2):
        for k in range(5):
            dices.append(2 * p[b, k][target[b] == k].sum() / (p[b, k].sum() + (target[b] == k).sum()))
    dice = 1 - torch.stack(dices).mean()
    assert (dice_ce(logits, target) - dice).item() == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-12)


def test_a_sure_and_right_answer_costs_nothing_and_a_wrong_one_is_finite():
    target = torch.randint(0, 3, (1, 4, 4, 4))
    right = 200.0 * F.one_hot(target, 3).movedim(-1, 1)
    assert dice_ce(right, target).item() == pytest.approx(0, abs=1e-6)
    wrong = right.roll(1, 1).requires_grad_()
    loss = dice_ce(wrong, target)
    loss.backward()
    assert loss.item() == pytest.approx(201, rel=1e-3) and bool(wrong.grad.isfinite().all())


def test_half_precision_is_summed_in_single_precision():
    logits, target = torch.zeros(1, 2, 64, 64, 64, dtype=torch.float16), torch.zeros(1, 64, 64, 64, dtype=torch.long)
    loss = dice_ce(logits, target)  # 262144 voxels: more than half precision counts to
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(torch.tensor(2.0).log().item() + 1 - 2 / 3, rel=1e-5)


def test_no_sample_depends_on_another_also_where_it_holds_fewer_classes():
    logits, target = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64), torch.randint(0, 3, (2, 4, 4, 4))
    target[1] = 1
    apart = [dice_ce(logits[i : i + 1], target[i : i + 1]).item() for i in range(2)]
    assert dice_ce(logits, target).item() == pytest.approx(sum(apart) / 2, rel=1e-12)


# Cross-entropy of voxels that have a class


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_mean_over_samples_of_means_over_voxels_with_a_class_equals_plain_loops(kind, tolerance):
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4, 2, 3, 4, dtype=torch.float64), torch.randint(-1, 4, (3, 2, 3, 4))
    target[1, :, :, 1:] = -1
    mine, theirs, means = logits.to(kind, copy=True).requires_grad_(), logits.clone().requires_grad_(), []
    for b in range(3):
        shares = theirs[b].exp() / theirs[b].exp().sum(0)
        torch.testing.assert_close(shares.sum(0), torch.ones(2, 3, 4, dtype=torch.float64))  # over the clusters of a voxel
        terms = [-shares[(k, *place)].log() for place in torch.cartesian_prod(*map(torch.arange, (2, 3, 4))).tolist() if (k := int(target[(b, *place)])) >= 0]
        means.append(sum(terms) / len(terms))
    found, expected = cross_entropy(mine, target), sum(means) / 3
    found.backward()
    expected.backward()
    assert found.dtype == kind and found.item() == pytest.approx(expected.item(), rel=tolerance)
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)
    assert bool((mine.grad.ne(0).any(1) == (target >= 0)).all())


def test_where_every_voxel_has_a_class_it_is_pytorchs_and_where_none_has_it_is_0():
    logits, target = torch.randn(2, 5, 4, 4, 4, dtype=torch.float64, requires_grad=True), torch.randint(0, 5, (2, 4, 4, 4))
    assert cross_entropy(logits, target).item() == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-12)
    nothing = cross_entropy(logits, torch.full_like(target, -1))
    nothing.backward()
    assert nothing.item() == 0 and not logits.grad.any()
    half = cross_entropy(logits, torch.stack((target[0], torch.full_like(target[1], -1))))
    assert half.item() == pytest.approx(F.cross_entropy(logits[:1], target[:1]).item() / 2, rel=1e-12)


def test_logits_of_any_size_give_finite_values_and_gradients():
    logits = torch.tensor([200.0, -200.0, 0.0]).view(1, 3, 1, 1, 1).repeat(1, 1, 2, 2, 2).requires_grad_()  # the softmax of the second one is 0 in fp32
    loss = cross_entropy(logits, torch.ones(1, 2, 2, 2, dtype=torch.long))
    loss.backward()
    assert loss.item() == pytest.approx(400) and bool(logits.grad.isfinite().all())
