"""The second stage of DINOv2: larger crops, from the weights of the first."""

import dataclasses
import math

import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.trainers.checkpoint import load_checkpoint
from nnssl_ext.trainers.dinov2 import DINOv2Trainer
from nnssl_ext.trainers.dinov2_high_res import DINOv2HighResTrainer, large_crop
from nnssl_ext.trainers.initial import Initial
from tests.make_data import tiny_plan, tiny_store

pytestmark = pytest.mark.usefixtures("undrawn")
SMALL = {"epochs": 1, "iterations": 2, "workers": 0, "prototypes": 16, "hidden": 16, "bottleneck": 8, "locals": 1}


@pytest.fixture(autouse=True)
def _results(tmp_path, monkeypatch):
    monkeypatch.setenv("nnssl_results", str(tmp_path))


def make(cls, folder, **options):
    return cls(tiny_plan(), "3d_fullres", cls.Config(**{**SMALL, **options}), tiny_store(), folder, family="primus")


def test_crops_are_half_as_many_whole_tokens_again():
    assert large_crop((64, 96, 32), (8, 8, 8)) == (96, 144, 48)
    assert large_crop((24, 40, 8), (8, 8, 8)) == (32, 56, 8)
    assert large_crop((16, 12, 20), (4, 4, 4)) == (24, 16, 28)


def test_views_have_the_large_crops_and_local_ones_of_half_their_edge(tmp_path):
    trainer = make(DINOv2HighResTrainer, tmp_path, batch_size=2)
    trainer.initialize()
    batch = trainer._dataset(trainer.train_cases, "train")[0]
    assert batch["global_1"].image.shape == (2, 1, 24, 24, 24) and batch["global_1"].mask.shape == (2, 6, 6, 6)
    assert batch["local_0"].image.shape == (2, 1, 12, 12, 12)


def test_batch_and_learning_rate_shrink_the_temperature_stays_at_its_end_and_nothing_is_frozen(tmp_path):
    first, second = make(DINOv2Trainer, tmp_path), make(DINOv2HighResTrainer, tmp_path)
    assert second.batch_size == max(2, round(first.batch_size / 1.5**3))
    assert second.recipe.lr == pytest.approx(0.1 * first.recipe.lr * math.sqrt(second.batch_size / first.batch_size))
    assert second.settings.temperatures == (first.settings.temperatures[1],) * 2 and second.settings.freeze == 0
    assert second.settings.heads == first.settings.heads
    assert DINOv2HighResTrainer.Config().epochs == DINOv2Trainer.Config().epochs // 10
    given = make(DINOv2HighResTrainer, tmp_path, batch_size=5, lr=1e-3, freeze=7, teacher_temperature=(0.03, 0.06))
    assert (given.batch_size, given.recipe.lr, given.settings.freeze, given.settings.temperatures) == (5, 1e-3, 7, (0.03, 0.06))


def test_a_large_batch_is_divided_by_the_growth_of_the_crop_in_tokens(tmp_path):
    plan = tiny_plan()
    config = plan.configuration("3d_fullres")
    network = dataclasses.replace(config.networks["primus"], batch_size=192)
    plan = dataclasses.replace(plan, gpu_memory_target_gb=24.0, configurations={"3d_fullres": dataclasses.replace(config, networks={"primus": network})})
    first, second = (cls(plan, "3d_fullres", cls.Config(**SMALL), tiny_store(), tmp_path) for cls in (DINOv2Trainer, DINOv2HighResTrainer))
    assert (first.batch_size, second.batch_size) == (64, round(64 / 1.5**3))
    assert (first.settings.koleo, second.settings.koleo, second.settings.volumes) == (0.1, 0.1, 19)
    assert first.settings.heads == second.settings.heads and first.settings.centring == second.settings.centring == "sinkhorn"


def test_it_goes_on_with_the_teachers_weights_the_heads_and_the_centre(tmp_path, capsys):
    make(DINOv2Trainer, tmp_path / "first").fit()
    run = make(DINOv2HighResTrainer, tmp_path / "second")
    state = load_checkpoint(tmp_path / "first" / "checkpoint_final.pth")["ssl_state"]
    run.initialize()
    run.init = Initial.open("first/checkpoint_final.pth")
    run.init.fill(run)
    for name, value in run.model.student.state_dict().items():
        assert torch.equal(value, state[f"teacher.net.{name}"]) and torch.equal(value, run.model.teacher.net.state_dict()[name])
    assert bool(state["centre.value"].any()) and torch.equal(run.model.centre.value, state["centre.value"])
    assert "with its heads" in (report := capsys.readouterr().out) and " 0 left" in report


def test_it_trains_stops_and_continues_without_the_first_checkpoint(tmp_path):
    make(DINOv2Trainer, tmp_path / "first").fit()
    run = make(DINOv2HighResTrainer, tmp_path / "second")
    run.init = Initial.open("first/checkpoint_final.pth")
    run.fit(stop_at=1)
    make(DINOv2HighResTrainer, tmp_path / "second").fit(resume=True)
    content = load_checkpoint(tmp_path / "second" / "checkpoint_final.pth")
    assert content["step"] == 2 and content["init"]["method"] == "DINOv2Trainer"
    assert content["nnssl_adaptation_plan"]["recommended_downstream_patchsize"] == [16, 16, 16]


def test_without_a_first_stage_it_does_not_begin(tmp_path):
    run = make(DINOv2HighResTrainer, tmp_path / "second")
    with pytest.raises(UserError, match="goes on from a checkpoint of DINOv2Trainer"):
        run.fit()
    run.init = Initial({"file": "m.pth", "sha256": "0" * 64, "method": "MAETrainer", "step": 1}, {"ssl_state": {}})
    with pytest.raises(UserError, match="goes on from a checkpoint of DINOv2Trainer"):
        run.fit()
    assert not list(tmp_path.glob("second/*"))


def test_other_heads_than_those_of_the_first_stage_are_refused_with_their_sizes(tmp_path):
    make(DINOv2Trainer, tmp_path / "first").fit()
    run = make(DINOv2HighResTrainer, tmp_path / "second", prototypes=32)
    run.init = Initial.open("first/checkpoint_final.pth")
    with pytest.raises(UserError, match="student.dino_head.prototypes 16x8, here 32x8"):
        run.fit()
