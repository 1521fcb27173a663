"""DINOv2Trainer with an anchor: when it is taken, that it stays, and what the student is compared at."""

import json

import pytest
import torch

from nnssl_ext.nn.gram import visible_tokens
from nnssl_ext.nn.losses import gram_loss
from nnssl_ext.trainers.checkpoint import load_checkpoint
from nnssl_ext.trainers.dinov2 import DINOv2Trainer
from nnssl_ext.trainers.dinov2_high_res import DINOv2HighResTrainer
from nnssl_ext.trainers.initial import Initial
from tests.conformance.pairs import first_batch
from tests.make_data import tiny_plan, tiny_store

pytestmark = pytest.mark.usefixtures("undrawn")
SMALL = {
    "epochs": 3,
    "iterations": 2,
    "workers": 0,
    "batch_size": 2,
    "prototypes": 16,
    "hidden": 16,
    "bottleneck": 8,
    "locals": 1,
    "lr": 1e-2,
    "momentum": (0.5, 0.5),
}


def make(folder, cls=DINOv2Trainer, **options):
    return cls(tiny_plan(), "3d_fullres", cls.Config(**{**SMALL, **options}), tiny_store(), folder, family="primus")


def tensors(state, prefix):
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def test_the_anchor_is_the_teacher_at_the_start_of_an_epoch_and_stays_it(tmp_path):
    make(tmp_path, gram=1.0, gram_start=0.34).fit(stop_at=2)
    before = load_checkpoint(tmp_path / "checkpoint_latest.pth")["ssl_state"]
    make(tmp_path, gram=1.0, gram_start=0.34).fit(resume=True)
    after = load_checkpoint(tmp_path / "checkpoint_final.pth")["ssl_state"]
    assert not same(tensors(before, "anchor.net."), tensors(before, "teacher.net.backbone."))
    assert same(tensors(after, "anchor.net."), tensors(before, "teacher.net.backbone."))
    assert not same(tensors(after, "anchor.net."), tensors(after, "teacher.net.backbone."))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert ["train/gram" in record and "val/gram" in record for record in records] == [False, True, True]
    last = records[-1]
    assert last["train/total"] == pytest.approx(last["train/dino"] + last["train/ibot"] + last["train/gram"], rel=1e-5) and last["train/gram"] > 0


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_with_an_anchor_continues_bit_for_bit(stop, tmp_path):
    make(tmp_path / "whole", gram=2.0, gram_start=0.34).fit()
    make(tmp_path / "parts", gram=2.0, gram_start=0.34).fit(stop_at=stop)
    make(tmp_path / "parts", gram=2.0, gram_start=0.34).fit(resume=True)
    assert same(*(load_checkpoint(tmp_path / name / "checkpoint_final.pth")["ssl_state"] for name in ("whole", "parts")))


def test_without_weight_there_is_no_anchor(tmp_path):
    trainer = make(tmp_path)
    trainer.initialize()
    assert trainer.model.anchor is None and not [name for name in trainer.model.state_dict() if "anchor" in name]


def test_the_loss_is_that_of_the_students_visible_tokens(tmp_path):
    trainer = make(tmp_path, gram=3.0, gram_start=0.0)
    trainer.initialize()
    for parameter in trainer.model.student.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    trainer.schedule(0)
    batch = first_batch(trainer)
    trainer.model.train()
    for block in (*trainer.model.student.backbone.net.eva.blocks,):
        block.eval()  # no drop path
    torch.manual_seed(0)
    losses = trainer.step(trainer.model, batch)
    image, mask = (torch.cat([getattr(batch[name], part) for name in ("global_0", "global_1")]) for part in ("image", "mask"))
    torch.manual_seed(0)
    index = visible_tokens(mask.flatten(1), 0.6)
    with torch.no_grad():
        expected = gram_loss(trainer.model.student(image, mask)[1], trainer.model.teacher(image)[1], index)
    assert losses["gram"].item() == pytest.approx(expected.item(), rel=1e-5) and expected > 0
    assert losses["total"].item() == pytest.approx((losses["dino"] + losses["ibot"] + 3 * losses["gram"]).item(), rel=1e-6)


def test_a_second_stage_takes_the_first_ones_teacher_as_its_anchor(tmp_path, monkeypatch):
    monkeypatch.setenv("nnssl_results", str(tmp_path))
    make(tmp_path / "first", epochs=1).fit()
    run = make(tmp_path / "second", DINOv2HighResTrainer, epochs=1, gram=1.0, gram_start=0.0)
    run.init = Initial.open("first/checkpoint_final.pth")
    run.fit()
    first, second = (load_checkpoint(tmp_path / name / "checkpoint_final.pth")["ssl_state"] for name in ("first", "second"))
    assert same(tensors(second, "anchor.net."), tensors(first, "teacher.net.backbone."))
