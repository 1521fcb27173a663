"""Losses equal plain loops, and what a mask hides has no influence."""

import math
from dataclasses import replace

import pytest
import torch

from nnssl_ext.trainers.mae import MAETrainer
from tests.conformance.oracles import ORACLES, hidden_voxels
from tests.conformance.pairs import PAIRS, Pair, features_of, first_batch, registered


def prepared(pair, folder, float64):
    """The trainer in evaluation mode (no drop path, no queue that moves) and a batch."""
    trainer = pair.trainer(folder, float64=float64)
    trainer.initialize()
    trainer.model.eval()
    batch = first_batch(trainer)
    return trainer, {name: replace(view, image=view.image.double()) for name, view in batch.items()} if float64 else batch


def gradients(trainer, loss):
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True))]
    )


@pytest.mark.parametrize("method", registered())
def test_every_method_has_an_oracle(method):
    assert method in ORACLES, f"{method} has no oracle: add a function to tests/conformance/oracles.py that computes its losses with plain loops"


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_losses_and_gradients_equal_plain_loops(pair, tmp_path):
    trainer, batch = prepared(pair, tmp_path, float64=True)
    found, expected = trainer.step(trainer.model, batch), ORACLES[pair.method](trainer, batch)
    assert set(found) == set(expected)
    for name, loss in found.items():
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-6), name
    mine, theirs = gradients(trainer, found["total"]), gradients(trainer, expected["total"])
    assert theirs.norm() > 0 and (mine - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_losses_in_fp32_equal_plain_loops(pair, tmp_path):
    trainer, batch = prepared(pair, tmp_path, float64=False)
    with torch.no_grad():
        found, expected = trainer.step(trainer.model, batch), ORACLES[pair.method](trainer, batch)
    for name, loss in found.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-5, abs=1e-5), name


def encoded(trainer, batch):
    """Everything that the trained backbone computes in a training step."""
    state = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    torch.manual_seed(0)
    with torch.no_grad(), features_of(trainer.backbone) as features:
        trainer.step(trainer.model.train(), batch)
    trainer.model.load_state_dict(state)
    return features


def check_hidden(pair, folder):
    """Whatever lies under a view's mask changes nothing, what is visible does; returns the number of masked views."""
    trainer = pair.trainer(folder)
    trainer.initialize()
    batch = first_batch(trainer)
    before, masked = encoded(trainer, batch), {name: view for name, view in batch.items() if view.mask is not None}
    assert before
    for name, view in masked.items():
        hidden, noise = hidden_voxels(view)[:, None], 1e3 * torch.randn_like(view.image)
        changed = encoded(trainer, {**batch, name: replace(view, image=torch.where(hidden, noise, view.image))})
        assert len(changed) == len(before) and all(torch.equal(a, b) for a, b in zip(before, changed)), f"hidden voxels of '{name}' reach the backbone"
        changed = encoded(trainer, {**batch, name: replace(view, image=torch.where(hidden, view.image, noise))})
        assert any(not torch.equal(a, b) for a, b in zip(before, changed)), f"visible voxels of '{name}' do not reach the backbone"
    return len(masked)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_hidden_voxels_never_reach_the_trained_backbone_and_visible_ones_do(pair, tmp_path):
    check_hidden(pair, tmp_path)


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_a_method_that_lets_one_hidden_block_through_is_found(family, tmp_path):
    class Leaking(MAETrainer):
        def step(self, model, batch):
            mask = batch["image"].mask.clone()
            mask.view(-1)[mask.flatten().nonzero()[0]] = False
            mask[1] = mask[0]  # equal counts
            return super().step(model, {"image": replace(batch["image"], mask=mask)})

    assert check_hidden(Pair(MAETrainer, family), tmp_path) == 1
    with pytest.raises(AssertionError, match="hidden voxels of 'image' reach the backbone"):
        check_hidden(Pair(Leaking, family), tmp_path)


def test_hidden_voxels_are_those_of_the_hidden_blocks_also_where_the_last_block_is_cut(tmp_path):
    trainer = PAIRS[0].trainer(tmp_path)
    trainer.initialize()
    view = next(iter(first_batch(trainer).values()))
    mask = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    mask[1, 1, 0, 1] = True
    hidden = hidden_voxels(replace(view, image=torch.zeros(2, 1, 5, 4, 7), mask=mask))
    assert hidden.sum() == math.prod((2, 2, 3)) and bool(hidden[1, 3:, :2, 4:].all())
