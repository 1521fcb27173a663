"""Registration as pretext: which pairs, what learns from which loss, and that a shift is found."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl_ext.nn.registration_losses import squared_lncc
from nnssl_ext.nn.warp import warp
from nnssl_ext.trainers.description import describe
from nnssl_ext.trainers.registration_pretext import RegistrationPretextTrainer, known
from tests.make_data import TINY_SHAPE, ArrayStore, tiny_plan


def make(folder, channels=1, patch=(16, 16, 16), subjects=True, **options):
    config = RegistrationPretextTrainer.Config(**{"batch_size": 4, "workers": 0, **options})
    store = ArrayStore(8, TINY_SHAPE, channels)
    if not subjects:
        store.subject = lambda case: "a"
    trainer = RegistrationPretextTrainer(tiny_plan(channels, patch), "3d_fullres", config, store, folder)
    trainer.initialize()
    return trainer


def batch(trainer, step=0):
    return trainer._dataset(trainer.train_cases, "train")[step]


def test_moving_crops_are_of_the_same_case_or_of_another_training_subject(tmp_path):
    trainer = make(tmp_path, batch_size=16)
    views = batch(trainer)
    same = known(views).tolist()
    assert set(same) == {True, False} and set(views["moving"].cases) <= set(trainer.train_cases)
    assert [bool(u.any()) for u in views["displacement"].image] == same


def test_a_dataset_of_one_subject_has_known_pairs_alone_and_says_so(tmp_path, capsys):
    trainer = make(tmp_path, subjects=False)
    assert "every pair is a crop and a known warp of it" in capsys.readouterr().out
    assert json.loads(json.dumps(describe(trainer)))["derived"] == {"known": 1.0}
    assert known(batch(trainer)).all() and torch.isfinite(trainer.step(trainer.model, batch(trainer))["total"])
    assert describe(make(tmp_path))["derived"] == {"known": 0.5} and not capsys.readouterr().out


@pytest.mark.parametrize("term", ["similarity", "end_point"])
def test_encoder_and_every_velocity_step_learn_from_each_term_alone(term, tmp_path):
    trainer = make(tmp_path, **{name: float(name == term) for name in ("similarity", "smoothness", "end_point")})
    trainer.step(trainer.model, batch(trainer))["total"].backward()
    for step in trainer.model.steps:
        assert all(bool(parameter.grad.any()) for parameter in step.parameters())
        assert bool((step.decide[-1].bias.grad != 0).all())  # each axis
    assert all(bool(p.grad.any()) for p in trainer.model.backbone.net.encoder.stem.parameters() if p.ndim > 1)


def test_smoothness_alone_pulls_velocities_together(tmp_path):
    trainer = make(tmp_path, similarity=0.0, end_point=0.0)
    trainer.step(trainer.model, batch(trainer))["total"].backward()
    assert bool(trainer.model.steps[-1].decide[-1].weight.grad.any()) and not trainer.model.steps[-1].decide[-1].bias.grad.abs().max() > 1e-6


def test_the_loss_is_of_the_warped_crop_and_of_known_pairs_alone(tmp_path):
    trainer = make(tmp_path, channels=2, patch=(8, 24, 16), batch_size=6)
    views = batch(trainer)
    assert set(known(views).tolist()) == {True, False}
    with torch.no_grad():
        for step in trainer.model.steps:
            step.decide[-1].weight.mul_(1e5)  # so that something moves
        losses = trainer.step(trainer.model, views)
        _, displacement = trainer.model(views["fixed"].image, views["moving"].image)
    assert float(displacement.abs().mean()) > 0.1
    assert losses["similarity"].item() == pytest.approx(1 - squared_lncc(warp(views["moving"].image, displacement), views["fixed"].image).item())
    errors = (displacement - views["displacement"].image).norm(dim=1).mean((1, 2, 3))
    assert losses["end_point"].item() == pytest.approx(sum(float(e) for e, k in zip(errors, known(views)) if k) / 6, rel=1e-5)
    assert losses["total"].item() == pytest.approx(sum(losses[name].item() for name in ("similarity", "smoothness", "end_point")), rel=1e-5)


def test_a_shift_is_found_within_forty_steps(tmp_path):
    torch.manual_seed(0)
    trainer, shift = make(tmp_path, batch_size=2, known=1.0), 2
    whole, views = torch.nn.functional.interpolate(torch.randn(2, 1, 7, 7, 7), size=(20, 20, 20), mode="trilinear"), batch(trainer)
    true = torch.tensor([shift, 0.0, 0.0]).view(1, 3, 1, 1, 1).expand(2, 3, 16, 16, 16)
    images = {"fixed": whole[:, :, 2:18, 2:18, 2:18], "moving": whole[:, :, 2 - shift : 18 - shift, 2:18, 2:18], "displacement": true}
    views = {name: replace(views[name], image=image) for name, image in images.items()}
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        losses = trainer.step(trainer.model, views)
        losses["total"].backward()
        optimizer.step()
    assert losses["end_point"].item() < 0.5 and losses["similarity"].item() < 0.3


def test_a_single_sample_is_enough(tmp_path):
    trainer = make(tmp_path, batch_size=1)
    for step in range(3):
        assert torch.isfinite(trainer.step(trainer.model, batch(trainer, step))["total"])


def test_pictures_show_both_crops_what_becomes_of_them_and_where_voxels_move(tmp_path):
    trainer = make(tmp_path)
    views = batch(trainer)
    with torch.no_grad():
        rows = trainer.picture(views)
    assert len(rows) == 2 and list(rows[0])[:4] == ["fixed", "moving", "warped", "displacement"]
    assert np.array_equal(rows[1]["moving"], views["moving"].image[1, 0].numpy())
    for row, true in zip(rows, views["displacement"].image):
        shown = row["known (grey: none)"]
        assert shown.shape == (16, 16, 16, 3) and (np.abs(shown - 0.5).max() > 0) == bool(true.any())
        assert np.allclose(row["Jacobian (grey: 1)"], 0.5, atol=0.01)  # nothing moves yet
