"""Survival and exactness of the loop: stops, steps that are not finite, damaged checkpoints, accumulation, precision."""

import dataclasses
import os
import random
import signal

import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.trainers.checkpoint import load_checkpoint, load_latest, save_checkpoint
from nnssl_ext.trainers.mae import MAETrainer
from nnssl_ext.trainers.signals import Stopped
from tests.make_data import tiny_plan, tiny_store

pytestmark = pytest.mark.usefixtures("undrawn")
PLAN = tiny_plan()
SHORT = MAETrainer.Config(epochs=2, iterations=4, batch_size=1, workers=0)


class Tampered(MAETrainer):
    """Calls `before` with the number of each step before it is computed."""

    before = staticmethod(lambda trainer: None)

    def step(self, model, batch):
        self.before(self)
        losses = super().step(model, batch)
        return {"total": losses["total"] * getattr(self, "factor", 1.0)} if model.training else losses


def trainer(folder, config=SHORT, before=lambda trainer: None, family="primus"):
    made = Tampered(PLAN, "3d_fullres", config, tiny_store(), folder, family=family)
    made.before = before
    return made


def weights(folder, name="final"):
    return load_checkpoint(folder / f"checkpoint_{name}.pth")["ssl_state"]


def equal(one, two):
    return all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGUSR2, 140)])
def test_a_stop_signal_ends_after_its_step_and_the_run_continues_exactly(number, code, tmp_path):
    trainer(tmp_path / "whole").fit()

    def stop(running):
        if running.next_step == 5:
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped) as stopped:
        trainer(tmp_path / "parts", before=stop).fit()
    assert stopped.value.exit_code == code
    assert load_checkpoint(tmp_path / "parts" / "checkpoint_latest.pth")["step"] == 6
    trainer(tmp_path / "parts").fit(resume=True)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_that_is_not_finite_is_skipped_and_captured(value, precision, tmp_path):
    def shrink(running):
        running.factor = 0.1  # no overflow at fp16's first loss scale

    def spoil(running):
        running.factor = value if running.next_step == 2 else 0.1

    run = trainer(tmp_path, dataclasses.replace(SHORT, precision=precision), spoil)
    run.fit()
    assert run.guard.total == 1 and all(torch.isfinite(tensor).all() for tensor in weights(tmp_path).values())
    captured = load_checkpoint(tmp_path / "nonfinite_step_0000002.pth")
    assert captured["step"] == 2
    clean = trainer(tmp_path / "clean", dataclasses.replace(SHORT, precision=precision), shrink)
    clean.fit(stop_at=2)
    assert equal(captured["ssl_state"], weights(tmp_path / "clean", "latest"))  # the weights before the step


def test_too_many_such_steps_in_a_row_end_the_run_with_sound_weights(tmp_path):
    def spoil(running):
        running.factor = float("nan") if running.next_step >= 5 else 1.0

    with pytest.raises(UserError, match="3 steps in a row were not finite") as error:
        trainer(tmp_path, dataclasses.replace(SHORT, max_skips=3), spoil).fit()
    assert len(str(error.value).splitlines()) <= 3
    latest = load_latest(tmp_path)
    assert latest["step"] == 4 and all(torch.isfinite(tensor).all() for tensor in latest["ssl_state"].values())


def test_two_accumulated_batches_are_one_of_twice_the_size(tmp_path):
    config = dataclasses.replace(SHORT, epochs=1, lr=1e-3)  # SGD and no drop path: the steps depend on the gradient alone
    trainer(tmp_path / "one", dataclasses.replace(config, batch_size=2), family="resenc").fit()
    trainer(tmp_path / "two", dataclasses.replace(config, batch_size=1, accumulate=2), family="resenc").fit()
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max(float((value - two[key]).abs().max()) for key, value in one.items()) < 1e-5


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "fp16"}, {"accumulate": 2}])
def test_resuming_is_exact_in_every_precision_and_with_accumulation(options, tmp_path):
    config = dataclasses.replace(SHORT, **options)
    trainer(tmp_path / "whole", config).fit()
    trainer(tmp_path / "parts", config).fit(stop_at=3)
    trainer(tmp_path / "parts", config).fit(resume=True)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_one_flipped_bit_of_a_checkpoint_is_found_wherever_it_is(tmp_path):
    path, chance = tmp_path / "checkpoint_latest.pth", random.Random(0)
    save_checkpoint(path, {"network_weights": {"w": torch.randn(3000)}, "step": 1})
    content = path.read_bytes()
    for _ in range(500):
        broken = bytearray(content)
        broken[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(path)
    path.write_bytes(content)
    assert load_checkpoint(path)["step"] == 1


def test_a_damaged_latest_checkpoint_falls_back_to_the_previous_one(tmp_path, capsys):
    trainer(tmp_path / "whole").fit()
    trainer(tmp_path / "parts").fit(stop_at=7)
    latest = tmp_path / "parts" / "checkpoint_latest.pth"
    latest.write_bytes(latest.read_bytes()[:-100])
    trainer(tmp_path / "parts").fit(resume=True)
    assert "continuing from checkpoint_previous.pth, step 4" in capsys.readouterr().out
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(UserError, match="unknown precision 'fp8'"):
        trainer(tmp_path, dataclasses.replace(SHORT, precision="fp8")).fit()
