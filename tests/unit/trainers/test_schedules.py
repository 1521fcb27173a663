"""Closed forms of the schedules, and runs that follow them."""

import math
from typing import ClassVar
from unittest.mock import patch

import pytest
import torch

from nnssl_ext.nn.momentum import MomentumTeacher
from nnssl_ext.trainers.optim import Recipe, set_rates
from nnssl_ext.trainers.schedules import cosine, linear, polynomial
from tests.make_data import tiny_plan, tiny_store
from tests.toy_trainers import ToyEMATrainer

pytestmark = pytest.mark.usefixtures("undrawn")


def test_the_polynomial_rises_linearly_and_falls_to_zero():
    rates = [polynomial(step, 100, 1.0, 10) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5**0.9)
    assert rates[99] == pytest.approx((1 / 90) ** 0.9)
    assert rates[100] == polynomial(130, 100, 1.0, 10) == 0


def test_the_cosine_rises_linearly_and_runs_through_its_middle_to_its_end():
    rates = [cosine(step, 100, 0.8, 0.2, 20) for step in range(101)]
    assert rates[:20] == pytest.approx([0.04 * (i + 1) for i in range(20)])
    assert rates[20] == 0.8
    assert rates[40] == pytest.approx(0.5 + 0.3 * 2**-0.5)  # a quarter of the way
    assert rates[60] == pytest.approx(0.5)
    assert rates[100] == cosine(130, 100, 0.8, 0.2, 20) == 0.2
    assert all(a > b for a, b in zip(rates[20:], rates[21:]))


def test_the_cosine_also_rises():
    assert [cosine(step, 4, 0.04, 0.2) for step in (0, 2, 4)] == pytest.approx([0.04, 0.12, 0.2])


def test_the_line_is_straight_and_then_level():
    assert [linear(step, 4, 0.04, 0.08) for step in range(7)] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.08, 0.08, 0.08])
    assert linear(0, 0, 0.04, 0.07) == 0.07


def test_without_warm_up_a_schedule_starts_at_its_peak():
    assert polynomial(0, 1000, 1e-2) == cosine(0, 1000, 1e-2, 0.0) == 1e-2


def test_a_run_of_one_step_has_its_peak():
    assert polynomial(0, 1, 1e-2) == cosine(0, 1, 1e-2, 0.0) == cosine(0, 1, 1e-2, 0.0, 1) == 1e-2


@pytest.mark.parametrize("accumulate", [1, 6])
@pytest.mark.parametrize("stops", [[8], [3, 8], [4, 5, 8]])
def test_a_run_follows_the_closed_forms_from_wherever_it_is_resumed(stops, accumulate, tmp_path):
    for number, stop in enumerate(stops):
        trainer = run(tmp_path, accumulate=accumulate)
        trainer.fit(resume=number > 0, stop_at=stop)
        begin = stops[number - 1] if number else 0
        expected = []
        for step in range(begin, stop):
            rate = 1e-3 * (step + 1) / 2 if step < 2 else 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * (step - 2) / 6)) / 2
            decay = 0.2 - 0.16 * (1 + math.cos(math.pi * step / 8)) / 2
            expected.append(pytest.approx([rate, decay, 0.0 if step < 3 else rate / 2, 0.0]))
        assert trainer.rates == expected


def test_two_steps_of_six_batches_move_schedules_and_teacher_twice(tmp_path):
    trainer = run(tmp_path, accumulate=6)
    with patch.object(MomentumTeacher, "update", autospec=True, side_effect=MomentumTeacher.update) as update:
        trainer.fit(stop_at=2)
    assert len(trainer.seen) == 12 and len(trainer.rates) == 2
    momenta = [call.args[2] for call in update.call_args_list]
    assert momenta == pytest.approx([0.9, 0.99 - 0.09 * (1 + math.cos(math.pi / 8)) / 2])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_teacher_is_the_closed_form_of_all_students_so_far(accumulate, tmp_path):
    trainer = run(tmp_path, accumulate=accumulate)
    trainer.fit(stop_at=5)
    momenta = [0.99 - 0.09 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(5)]
    for name, parameter in trainer.model.teacher.net.named_parameters():
        first, *students = (student[name].double() for student in trainer.students)
        shares = [(1 - m) * math.prod(momenta[step + 1 :]) for step, m in enumerate(momenta)]
        expected = math.prod(momenta) * first + sum(share * student for share, student in zip(shares, students, strict=True))
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(students[0], students[-1]) or name.endswith("bias")


class Scheduled(ToyEMATrainer):
    """Everything moves: learning rate, weight decay and momentum; a group is frozen at first and another rate falls with it."""

    recipes: ClassVar = {"primus": Recipe("adamw", 1e-3, 0.04, 0.25, 3.0)}

    def initialize(self):
        super().initialize()
        self.rates, self.seen, self.students = [], [], [self.student()]

    def student(self):
        return {name: parameter.detach().clone() for name, parameter in self.model.student.named_parameters()}

    def param_groups(self, model):
        heads = [parameter for module in (model.student.head, model.predictor) for parameter in module.parameters()]
        return [{"params": list(model.student.backbone.parameters())}, {"params": heads, "name": "last", "lr_scale": 0.5, "wd_scale": 0.0, "part": "head"}]

    def schedule(self, step):
        rate = cosine(step, self.total_steps, self.recipe.lr, 1e-6, self.warmup_steps)
        set_rates(self.optimizer, rate, cosine(step, self.total_steps, 0.04, 0.2), frozen=("last",) if step < 3 else ())

    def step(self, model, batch):
        if model.training:
            self.seen.append(self.next_step)
        return super().step(model, batch)

    def after_update(self, step):
        super().after_update(step)
        self.rates.append([group[kind] for group in self.optimizer.param_groups for kind in ("lr", "weight_decay")])
        self.students.append(self.student())


def run(folder, accumulate):
    config = Scheduled.Config(epochs=2, iterations=4, val_iterations=1, batch_size=2, workers=0, accumulate=accumulate)
    return Scheduled(tiny_plan(), "3d_fullres", config, tiny_store(), folder, family="primus")
