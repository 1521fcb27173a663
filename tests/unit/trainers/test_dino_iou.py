"""DINO on pairs with a controlled IoU: the pairs, the teacher, its centre, the frozen prototypes, and the alarm. Its loss is checked in tests/conformance."""

import math

import pytest
import torch
from timm.layers import DropPath

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.sampling import iou
from nnssl_ext.data.spatial import bounds
from nnssl_ext.trainers.dino_iou import DINOIoUTrainer
from nnssl_ext.trainers.health import HealthMonitor
from nnssl_ext.trainers.layer_decay import LAST_LAYER
from nnssl_ext.trainers.schedules import cosine
from tests.conformance.pairs import Pair, first_batch
from tests.make_data import ArrayStore, tiny_store
from tests.unit.trainers.test_health import make, run


def made(folder, family="primus", **options):
    trainer = Pair(DINOIoUTrainer, family).trainer(folder, **options)
    trainer.initialize()
    trainer.waited = 0.0
    return trainer


def steps(trainer, first, last):
    """Optimiser steps first to last (exclusive), without the loop around them."""
    micro = trainer.config.accumulate
    for step in range(first, last):
        trainer.next_step = step
        trainer._update(step, iter([first_batch(trainer, step * micro + i) for i in range(micro)]))


@pytest.mark.parametrize("interval", [(0.3, 0.6), (0.7, 0.8)], ids=str)
def test_the_iou_of_the_large_crops_lies_in_the_interval_and_small_ones_are_half_as_long(interval, tmp_path):
    spec, store = Pair(DINOIoUTrainer, "primus").trainer(tmp_path, iou=interval).views(), tiny_store()
    for number in range(20):
        views = spec.sample(store, number % 8, sample_rng(0, number))
        assert [view.image.shape[1:] for view in views.values()] == [(16,) * 3] * 2 + [(8,) * 3] * 2
        assert interval[0] <= iou(*(bounds(views[name].affine, (16,) * 3) for name in ("global_0", "global_1"))) <= interval[1]


def test_the_teacher_starts_as_an_exact_copy_gets_no_gradient_and_is_handed_over(tmp_path):
    trainer = made(tmp_path)
    model = trainer.model
    mine, theirs = model.student.state_dict(), model.teacher.net.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert trainer.transferred() is model.teacher.net.backbone
    model.teacher.requires_grad_(True)  # even then
    trainer.step(model.train(), first_batch(trainer))["total"].backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.student.parameters())


def test_the_student_drops_paths_while_it_trains_and_the_teacher_never_does(tmp_path):
    trainer = made(tmp_path, batch_size=4)
    model, image = trainer.model.train(), first_batch(trainer)["global_0"].image
    assert max(module.drop_prob for module in model.teacher.modules() if isinstance(module, DropPath)) == pytest.approx(0.2)
    with torch.no_grad():
        outputs = {part: [net(image) for _ in range(6)] for part, net in (("student", model.student), ("teacher", model.teacher))}
    assert all(torch.equal(z, outputs["teacher"][0]) for z in outputs["teacher"])
    assert any(not torch.equal(z, outputs["student"][0]) for z in outputs["student"])


def test_where_nothing_is_told_apart_the_loss_is_the_logarithm_of_the_number_of_prototypes(tmp_path):
    trainer = made(tmp_path)
    for net in (trainer.model.student, trainer.model.teacher.net):
        torch.nn.init.zeros_(net.head.mlp[-1].weight)
    assert trainer.step(trainer.model, first_batch(trainer))["total"].item() == pytest.approx(math.log(32), rel=1e-6)


def test_teacher_and_centre_move_once_per_optimiser_step_by_what_one_computes_by_hand(tmp_path):
    trainer = made(tmp_path, accumulate=3, momentum=(0.9, 1.0), lr=1e-2, warmup=0.0)
    model, logits, centre = trainer.model, [], torch.zeros(32)
    add = model.centre.add
    model.centre.add = lambda x: (logits.append(x.clone()), add(x))
    expected = {name: value.clone() for name, value in model.teacher.net.state_dict().items() if value.is_floating_point()}
    for step in range(3):
        steps(trainer, step, step + 1)
        momentum = 1.0 - (1.0 - 0.9) * (1 + math.cos(math.pi * step / trainer.total_steps)) / 2
        expected = {name: momentum * value + (1 - momentum) * model.student.state_dict()[name] for name, value in expected.items()}
        centre = 0.9 * centre + 0.1 * torch.cat(logits[-3:]).mean(0)
    assert len(logits) == 9 and [len(x) for x in logits] == [4] * 9  # two large crops of two volumes
    torch.testing.assert_close(model.centre.value, centre, rtol=1e-5, atol=1e-7)
    for name, value in expected.items():
        torch.testing.assert_close(model.teacher.net.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def test_prototypes_stay_while_they_are_frozen_and_move_afterwards(tmp_path):
    trainer = made(tmp_path, freeze=2, lr=1e-2, warmup=0.0)
    prototypes = trainer.model.student.head.prototypes
    before = prototypes.detach().clone()
    steps(trainer, 0, 2)
    assert torch.equal(prototypes, before)
    steps(trainer, 2, 3)
    assert not torch.equal(prototypes, before)
    (group,) = [group for group in trainer.optimizer.param_groups if group.get("name") == LAST_LAYER]
    assert [id(parameter) for parameter in group["params"]] == [id(prototypes)]


def test_rates_and_temperature_follow_their_schedules(tmp_path, monkeypatch):
    trainer, seen = made(tmp_path, teacher_temperature=(0.04, 0.06), lr=1e-3, freeze=1), []
    original = type(trainer.model).forward
    monkeypatch.setattr(type(trainer.model), "forward", lambda self, *inputs: (seen.append(inputs[2]), original(self, *inputs))[1])
    steps(trainer, 0, 3)
    assert seen == [pytest.approx(0.04 + 0.02 * step / 20) for step in range(3)]
    for step in (0, 1, 5, 19):
        trainer.schedule(step)
        for group in trainer.optimizer.param_groups:
            frozen = step < 1 and group.get("name") == LAST_LAYER
            assert group["lr"] == pytest.approx(0.0 if frozen else cosine(step, 20, 1e-3, 1e-6, 2))


class Large(ArrayStore):
    """Many cases, of which nothing is read."""

    def __init__(self, cases):
        super().__init__(1, (4, 4, 4))
        self.arrays = self.arrays * cases

    def shape(self, case):
        return (160, 160, 160)


@pytest.mark.parametrize(("cases", "volumes", "prototypes"), [(4, 64, 4096), (12, 8, 4096), (12, 16, 16384), (120, 128, 65536)])
def test_the_number_of_prototypes_grows_with_the_data(cases, volumes, prototypes, tmp_path):
    trainer = Pair(DINOIoUTrainer, "resenc").trainer(tmp_path, store=Large(cases), batch_size=volumes, prototypes=None, hidden=None, bottleneck=None)
    assert trainer.settings.head.prototypes == prototypes
    assert (trainer.settings.head.hidden, trainer.settings.head.bottleneck) == (96, 16)  # of an encoder of 16 channels
    assert trainer.settings.temperatures == ((0.03, 0.045) if prototypes == 4096 else (0.04, 0.07))


@pytest.mark.parametrize("options", [{"iou": (0.6, 0.3)}, {"momentum": (0.9,)}, {"teacher_temperature": (0.04,)}], ids=str)
def test_settings_that_make_no_sense_are_refused(options, tmp_path):
    with pytest.raises(UserError, match=f"{next(iter(options))} needs two numbers") as error:
        Pair(DINOIoUTrainer, "primus").trainer(tmp_path, **options)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_averages_of_a_u_net_are_standardised_over_the_crops_by_student_and_teacher(family, tmp_path):
    model = made(tmp_path, family, batch_size=4).model
    image = torch.randn(6, 1, 16, 16, 16)
    for net in (model.student, model.teacher.net):
        summary = net.summary(image)
        assert bool(summary.mean(0).abs().max() < 1e-4) is (family == "resenc")


def test_one_volume_per_step_is_enough(tmp_path):
    trainer = made(tmp_path, batch_size=1, locals=0)
    loss = trainer.step(trainer.model.train(), first_batch(trainer))["total"]
    loss.backward()
    assert math.isfinite(loss.item()) and all(bool(p.grad.isfinite().all()) for p in trainer.model.student.parameters())


class Uncentred(DINOIoUTrainer):
    """Forgets what its centre has collected."""

    def after_update(self, step):
        self.model.centre.count.zero_()
        super().after_update(step)


QUICK = {"prototypes": 32, "hidden": 32, "bottleneck": 16, "momentum": (0.9, 0.99)}  # a teacher that follows fast is tempted most


@pytest.mark.parametrize("cls", [DINOIoUTrainer, Uncentred])
def test_a_healthy_run_is_silent_and_one_without_centre_raises_the_alarm(cls, tmp_path):
    trainer = make(cls, tmp_path, **QUICK)
    records, alarms = run(trainer, HealthMonitor(trainer.backbone, 16, armed=16), 80, 2e-3)
    information = [record["health/dino/MI"] for record in records]
    if cls is Uncentred:
        assert not trainer.model.centre.value.any() and max(information[1:]) < 0.01
        assert len(alarms) == 1 and "collapsed" in alarms[0] and "dino/MI" in alarms[0] and trainer.health.collapsed
    else:
        assert trainer.model.centre.value.any() and min(information) > 0.2
        assert alarms == [] and not trainer.health.collapsed


@pytest.mark.slow
@pytest.mark.parametrize("family", ["primus", "resenc"])
def test_runs_with_the_sizes_that_users_have_stay_silent_and_tell_crops_apart(family, tmp_path):
    trainer = make(DINOIoUTrainer, tmp_path, family)
    records, alarms = run(trainer, HealthMonitor(trainer.backbone, 16, armed=16), 96, 2e-3)
    assert alarms == [] and min(record["health/dino/MI"] for record in records) > 0.5
