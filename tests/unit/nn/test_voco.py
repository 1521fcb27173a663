"""Losses of VoCo against plain loops and numbers by hand."""

import math

import pytest
import torch
from torch import nn

from nnssl_ext.nn.voco import CropProjector, Standardize, VoCoModel, absent, crowding, likeness, next_volume, position_loss, present


def row(*values):
    return torch.tensor([values])


def test_one_target_by_hand():
    s, o = row(0.0, 0.0, 1.0, 1.0), row(0.25, 0.75, 0.0, 0.0)
    assert present(s, o).item() == pytest.approx(1.1116, abs=5e-5)  # -0.25 log 0.75 - 0.75 log 0.25
    assert absent(s, o).item() == pytest.approx(13.8155, abs=5e-5)  # -log 1e-6
    assert position_loss(s, o).item() == pytest.approx(14.9271, abs=1e-4)


@pytest.mark.parametrize("o", [row(0.25, 0.75, 0.0, 0.0), row(1.0, 0.0), row(0.1, 0.9)])
def test_a_likeness_that_is_the_overlap_costs_nothing(o):
    assert position_loss(o, o).item() == pytest.approx(0, abs=1e-5)


def test_a_difference_by_rounding_costs_nothing_and_has_no_gradient():
    s = row(0.25 + 1e-7, 0.75 - 1e-7, 1e-8).requires_grad_()
    loss = position_loss(s, row(0.25, 0.75, 0.0))
    loss.backward()
    assert loss.item() == 0 and not s.grad.any()


def test_a_row_without_overlap_and_one_without_a_free_base_crop_cost_the_other_term_alone():
    s = row(0.3, 0.4)
    assert present(s, row(0.0, 0.0)).item() == 0 and absent(s, row(0.5, 0.5)).item() == 0
    assert position_loss(s, row(0.0, 0.0)).item() == pytest.approx(-(math.log(0.7) + math.log(0.6)) / 2, rel=1e-4)


def test_losses_and_gradients_are_those_of_a_plain_loop():
    torch.manual_seed(0)
    s = torch.rand(2, 3, 5, dtype=torch.float64, requires_grad=True)
    o = torch.rand(2, 3, 5, dtype=torch.float64) * (torch.rand(2, 3, 5) < 0.6)
    o[0, 0] = 0
    terms = []
    for volume in range(2):
        for target in range(3):
            near, weight, far = 0, 0, []
            for base in range(5):
                said, true = s[volume, target, base], o[volume, target, base]
                if true == 0:
                    far.append(-(1 - said + 1e-6).clamp(max=1).log())
                near, weight = near - true * (1 - (true - said).abs() + 1e-6).clamp(max=1).log(), weight + true
            terms.append((near / weight if weight else 0) + (sum(far) / len(far) if far else 0))
    expected = sum(terms) / 6
    found = position_loss(s, o)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, s)[0], torch.autograd.grad(expected, s)[0])


def test_likeness_is_the_positive_part_of_the_cosine_and_never_above_one_also_in_half_precision():
    targets = torch.tensor([[[1.0, 0.0], [-2.0, 0.0], [3.0, 3.0], [0.0, 0.0]]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = likeness(targets.bfloat16(), torch.tensor([[[5.0, 0.0], [0.0, 1.0]]]).bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0], torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.5**0.5, 0.5**0.5], [0.0, 0.0]]))
    vectors = torch.randn(1, 200, 3)
    assert likeness(vectors, vectors).max() <= 1


def test_equal_base_crops_are_crowded_and_opposite_or_orthogonal_ones_are_not():
    assert crowding(torch.ones(2, 4, 3)).item() == pytest.approx(1)
    assert crowding(torch.eye(4)[None]).item() == 0 and crowding(torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])).item() == 0
    assert crowding(torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]])).item() == pytest.approx(1 / 3)  # 1/2, 0, 1/2


def test_a_wrong_likeness_of_one_has_a_finite_gradient():
    vectors = torch.ones(1, 1, 4, requires_grad=True)
    position_loss(likeness(vectors, torch.ones(1, 2, 4)), row(1.0, 0.0)[None]).backward()
    assert bool(vectors.grad.isfinite().all())


def test_the_grid_of_the_next_volume_goes_round_and_has_no_gradient():
    bases = torch.arange(3.0, requires_grad=True)[:, None, None]
    found = next_volume(bases)
    assert found.flatten().tolist() == [1.0, 2.0, 0.0] and not found.requires_grad


def test_crops_are_standardised_within_their_volume():
    torch.manual_seed(0)
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    found = Standardize()(x)
    for volume in range(3):
        for channel in range(5):
            values = x[volume, :, channel]
            expected = (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
            torch.testing.assert_close(found[volume, :, channel], expected)
    assert torch.equal(Standardize()(torch.full((2, 4, 3), 7.0)), torch.zeros(2, 4, 3))


class Backbone(nn.Module):
    """Two maps."""

    widths = (2, 3)

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv3d(1, 5, 1)

    def pyramid(self, x):
        first, second = self.convolution(x).split([2, 3], 1)
        return [first, second[..., ::2]]


def test_the_teacher_starts_as_the_whole_student_gets_no_gradient_and_follows():
    torch.manual_seed(0)
    model = VoCoModel(CropProjector(Backbone(), 6))
    crops = torch.randn(5, 2, 1, 2, 2, 2)
    student, teacher = model(crops)
    assert student.shape == (2, 5, 6) and student.requires_grad and not teacher.requires_grad
    torch.testing.assert_close(student, teacher)
    before = [parameter.clone() for parameter in model.teacher.parameters()]
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter += 1
    model.teacher.update(model.student, 0.9)
    for old, new in zip(before, model.teacher.parameters(), strict=True):  # head and backbone alike
        torch.testing.assert_close(new, old + 0.1)
    assert len(before) == len(list(model.student.parameters()))


def test_vectors_of_a_volume_depend_on_its_own_crops_alone_and_come_in_the_order_of_the_views():
    torch.manual_seed(0)
    projector = CropProjector(Backbone(), 6)
    crops = torch.randn(5, 2, 1, 2, 2, 2)
    both = projector(crops)
    torch.testing.assert_close(both[1:], projector(crops[:, 1:]))
    torch.testing.assert_close(both.flip(1), projector(crops.flip(0)))
