"""Captured steps are repeated with the same batch, and the place where they stop being finite is found."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from nnssl_ext.core.errors import UserError
from nnssl_ext.data.views import Crop
from nnssl_ext.trainers.base import SSLTrainer
from nnssl_ext.trainers.checkpoint import load_checkpoint
from nnssl_ext.trainers.replay import replay
from tests.make_data import tiny_plan, tiny_store
from tests.toy_trainers import ToyQueueTrainer, TwoCrops

pytestmark = pytest.mark.usefixtures("undrawn")
PLAN = tiny_plan()
SHORT = SSLTrainer.Config(epochs=1, iterations=5, val_iterations=1, batch_size=2, workers=0, precision="fp32")


class Root(torch.autograd.Function):
    """|x| whose gradient is not finite at any x: as that of sqrt at 0."""

    @staticmethod
    def forward(context, x):
        return x.abs()

    @staticmethod
    def backward(context, gradient):
        return gradient * math.inf


class Breakable(nn.Module):
    """A few layers, one of which can be broken."""

    def __init__(self, backbone) -> None:
        super().__init__()
        self.backbone, self.first, self.second = backbone, nn.Linear(backbone.widths[-1], 8), nn.Linear(8, 1)
        self.broken = ""

    def forward(self, x):
        x = self.first(self.backbone.pooled(x))
        if self.broken == "gradient":
            x = Root.apply(x)
        return self.second(x * 1e30 * 1e30 if self.broken == "module" else x)


class BreakableTrainer(SSLTrainer):
    """Step 2 is broken in the way that `how` says."""

    how = ""

    def views(self):
        return TwoCrops(Crop(self.config_plan.patch_size))

    def build(self, backbone):
        return Breakable(backbone)

    def step(self, model, batch):
        model.broken = self.how if self.next_step == 2 and model.training else ""
        loss = model(batch["a"].image).square().mean()
        return {"total": loss * math.nan, "part": loss} if model.broken == "loss" else {"total": loss}


def made(folder, how="", cls=BreakableTrainer, **options):
    trainer = cls(PLAN, "3d_fullres", dataclasses.replace(SHORT, **options), tiny_store(), folder)
    trainer.how = how
    return trainer


def report(folder, step=2):
    return json.loads((folder / f"nonfinite_step_{step:07d}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("how", "verdict"),
    [
        ("module", "begins in the output of second (Linear)"),
        ("loss", "begins in the loss 'total': the outputs of all modules are finite"),
        ("gradient", "begins in the backward pass: the first gradient is that of first."),
    ],
)
def test_where_a_step_stops_being_finite_is_found(how, verdict, tmp_path, capsys):
    trainer = made(tmp_path, how)
    trainer.fit()
    weights = load_checkpoint(tmp_path / "checkpoint_final.pth")["ssl_state"]
    assert trainer.guard.total == 1 and all(tensor.isfinite().all() for tensor in weights.values())
    assert "--replay 2" in capsys.readouterr().out
    assert replay(made(tmp_path, how))
    found = report(tmp_path)
    assert verdict in found["verdict"] and verdict in capsys.readouterr().out
    assert found["losses"] == found["captured"]["losses"] and found["norm"] == found["captured"]["norm"]  # the very same step


def test_a_broken_input_is_found_with_its_case(tmp_path):
    def spoiled():
        trainer = made(tmp_path, max_skips=3)
        trainer.store.arrays[5][0, 3, 4, 5] = np.nan
        trainer.store.arrays[5][0, 10:, 10:, 10:] = np.inf
        return trainer

    first = spoiled()
    first.fit()
    assert first.guard.total and all(tensor.isfinite().all() for tensor in first.model.state_dict().values())
    assert replay(spoiled())
    (file,) = tmp_path.glob("nonfinite_step_*.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    assert {view["case"] for view in found["views"]} == {"case5"} and "of case5" in found["verdict"]


def test_a_broken_batch_does_not_stay_in_a_queue(tmp_path):
    class Spoiled(ToyQueueTrainer):
        def step(self, model, batch):
            if self.next_step == 2 and model.training:
                batch = {name: dataclasses.replace(view, image=view.image * math.nan) for name, view in batch.items()}
            return super().step(model, batch)

    trainer = made(tmp_path, cls=Spoiled)
    trainer.fit()
    assert trainer.guard.total == 1 and trainer.model.queue.isfinite().all()


def test_an_overflow_of_half_precision_is_told_with_the_scale(tmp_path):
    def scaled():
        trainer = made(tmp_path, precision="fp16")
        initialize = trainer.initialize
        trainer.initialize = lambda: (initialize(), trainer.update.scaler.__setattr__("_init_scale", 2.0**127))
        return trainer

    first = scaled()
    first.fit()
    assert first.guard.total >= 1 and all(tensor.isfinite().all() for tensor in first.model.state_dict().values())
    assert replay(scaled())
    found = report(tmp_path, 0)
    assert "backward pass" in found["verdict"] and "fp16 lowers by itself" in found["verdict"] and found["loss_scale"] == 2.0**127


def test_a_step_that_is_finite_elsewhere_is_said_to_be(tmp_path, capsys):
    made(tmp_path, "loss").fit()
    assert not replay(made(tmp_path))
    out = capsys.readouterr().out
    assert "the step is finite here" in out and "repeat it where the run ran" in out
    assert report(tmp_path)["reproduced"] is False


def test_a_run_without_that_capture_is_refused(tmp_path):
    with pytest.raises(UserError, match="no captured step to repeat"):
        replay(made(tmp_path))
    made(tmp_path, "loss").fit()
    with pytest.raises(UserError, match="no captured step of step 3") as error:
        replay(made(tmp_path), 3)
    assert error.value.fix == "captured: 2"
