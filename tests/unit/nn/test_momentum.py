"""The momentum teacher against its closed form."""

import math

import pytest
import torch
from torch import nn

from nnssl_ext.nn.momentum import MomentumTeacher, distance


def make() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    net.register_buffer("pointer", torch.tensor(0))
    return net


def test_the_teacher_starts_as_an_exact_copy_with_memory_of_its_own():
    student = make()
    teacher = MomentumTeacher(student)
    pairs = list(zip(student.state_dict().values(), teacher.net.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
    assert not any(p.requires_grad for p in teacher.parameters()) and all(p.requires_grad for p in student.parameters())


def test_k_updates_equal_the_closed_form():
    student, m = make(), 0.9
    teacher = MomentumTeacher(student)
    start = [p.detach().clone() for p in student.parameters()]
    seen = []
    for step in range(7):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(math.sin(step + 1.0))
        seen.append([p.detach().clone() for p in student.parameters()])
        teacher.update(student, m)
    for number, parameter in enumerate(teacher.parameters()):
        expected = m**7 * start[number] + sum((1 - m) * m ** (6 - k) * seen[k][number] for k in range(7))
        assert torch.allclose(parameter, expected, rtol=1e-12, atol=1e-12)


def test_floating_buffers_are_averaged_and_integers_copied():
    student = make()
    teacher = MomentumTeacher(student)
    student[1].running_mean.fill_(2.0)
    student[1].num_batches_tracked.fill_(5)
    student.pointer.fill_(9)
    teacher.update(student, 0.75)
    assert torch.equal(teacher.net[1].running_mean, torch.full((5,), 0.5, dtype=torch.float64))
    assert teacher.net[1].num_batches_tracked == 5 and teacher.net.pointer == 9


@pytest.mark.parametrize(("momentum", "same"), [(1.0, "teacher"), (0.0, "student")])
def test_momentum_one_keeps_the_teacher_and_zero_copies_the_student(momentum, same):
    student = make()
    teacher = MomentumTeacher(student)
    before = [p.clone() for p in teacher.parameters()]
    nn.init.ones_(student[0].weight)
    teacher.update(student, momentum)
    expected = before if same == "teacher" else list(student.parameters())
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), expected, strict=True))


def test_equal_weights_stay_bitwise_equal():
    student = make().float()
    teacher = MomentumTeacher(student)
    for _ in range(100):
        teacher.update(student, 0.997)
    assert all(torch.equal(a, b) for a, b in zip(teacher.net.state_dict().values(), student.state_dict().values()))


def test_the_teacher_stays_in_evaluation_mode_and_builds_no_graph():
    model = nn.ModuleDict({"student": make()})
    model["teacher"] = MomentumTeacher(model["student"])
    model.train()
    assert model["student"][2].training and not model["teacher"].net[2].training
    x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    assert not model["teacher"](x).requires_grad and torch.equal(model["teacher"](x), model["teacher"](x))


def test_distance_is_the_relative_norm_of_the_difference():
    a, b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        a.weight.copy_(torch.tensor([[3.0, 4.0]]))
        b.weight.copy_(torch.tensor([[3.0, 3.0]]))
    assert distance(a, b).item() == pytest.approx(0.2)
    assert distance(a, MomentumTeacher(a)).item() == 0.0
