"""VoCo: what its losses see, how many crops fit, what is refused."""

import math
from dataclasses import replace

import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.trainers.voco import VoCoTrainer
from tests.conformance.pairs import Pair, first_batch
from tests.make_data import TINY_SHAPE, tiny_plan


@pytest.fixture(params=["resenc", "primus"])
def trainer(request, tmp_path):
    made = Pair(VoCoTrainer, request.param).trainer(tmp_path)
    made.initialize()
    return made


def test_a_volume_has_nine_base_crops_and_two_targets_of_half_the_patch(trainer):
    batch = first_batch(trainer)
    assert list(batch) == [f"base_{number}" for number in range(9)] + ["target_0", "target_1"]
    assert all(view.image.shape == (2, 1, 8, 8, 8) for view in batch.values())
    labels = trainer.labels(batch)
    assert labels.shape == (2, 2, 9) and torch.allclose(labels.sum(-1), torch.ones(2, 2).double()) and bool((labels == 0).any(-1).all())


def test_the_total_is_the_sum_and_no_gradient_goes_to_the_teacher(trainer):
    losses = trainer.step(trainer.model, first_batch(trainer))
    assert losses["total"].item() == pytest.approx(sum(losses[name].item() for name in ("intra", "inter", "crowding")), rel=1e-6)
    losses["total"].backward()
    assert all(parameter.grad is None for parameter in trainer.model.teacher.parameters())


def test_before_the_first_step_the_teacher_says_what_the_student_says_and_pulls_nowhere(trainer):
    parameters = [parameter for parameter in trainer.model.student.parameters() if parameter.requires_grad]
    batch = first_batch(trainer)
    inter = trainer.step(trainer.model.eval(), batch)["inter"]
    assert inter.item() == 0 and not any(found.any() for found in torch.autograd.grad(inter, parameters, allow_unused=True) if found is not None)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1 * torch.randn_like(parameter)
    assert trainer.step(trainer.model, batch)["inter"] > 0


def test_the_teacher_follows_by_a_tenth(trainer):
    before = [parameter.clone() for parameter in trainer.model.teacher.parameters()]
    with torch.no_grad():
        for parameter in trainer.model.student.parameters():
            parameter += 1
    trainer.after_update(0)
    for old, new in zip(before, trainer.model.teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1)


@pytest.mark.parametrize(("planned", "grid", "expected"), [(2, (1, 3, 3), 2), (8, (1, 3, 3), 5), (8, (1, 4, 4), 3), (8, (1, 1, 2), 16)])
def test_as_many_volumes_as_have_no_more_voxels_than_the_planned_batch_but_two_at_least(planned, grid, expected, tmp_path):
    plan = tiny_plan()
    made = plan.configurations["3d_fullres"]
    networks = {name: replace(network, batch_size=planned) for name, network in made.networks.items()}
    plan = replace(plan, configurations={"3d_fullres": replace(made, networks=networks)})
    trainer = VoCoTrainer(plan, "3d_fullres", VoCoTrainer.Config(grid=grid), None, tmp_path, family="primus")
    crops = math.prod(grid) + 2
    assert trainer.batch_size == expected and (expected == 2 or expected * crops * math.prod(trainer.crop) <= planned * 16**3)


@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 3), (2, 2, 2, 2), (4,)], ids=str)
def test_a_grid_without_neighbours_or_of_other_than_three_axes_is_refused_in_a_sentence(grid, tmp_path):
    with pytest.raises(UserError, match="has no two neighbours along three axes") as error:
        Pair(VoCoTrainer, "primus").trainer(tmp_path, grid=grid)
    assert len(str(error.value).splitlines()) <= 3


def test_a_batch_of_one_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="VoCoTrainer compares samples and needs two") as error:
        Pair(VoCoTrainer, "primus").trainer(tmp_path, batch_size=1)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_cases_smaller_than_the_grid_are_no_obstacle(family, tmp_path):
    made = Pair(VoCoTrainer, family).trainer(tmp_path, grid=(3, 4, 3))
    assert min(24, *TINY_SHAPE) < 24
    made.initialize()
    losses = made.step(made.model, first_batch(made))
    assert all(bool(loss.isfinite()) for loss in losses.values())


def test_the_picture_shows_the_grid_the_target_and_both_likenesses(trainer):
    with torch.no_grad():
        rows = trainer.picture(first_batch(trainer))
    assert len(rows) == 2
    for row in rows:
        assert {name: volume.shape for name, volume in row.items()} == {
            "grid": (8, 24, 24),
            "target 0": (8, 8, 8),
            "overlap (target 0)": (8, 24, 24, 3),
            "likeness (target 0)": (8, 24, 24, 3),
        }
        assert all(0 <= volume.min() and volume.max() <= 1 for name, volume in row.items() if "(" in name)
