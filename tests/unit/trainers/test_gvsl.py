"""GVSL: what is moved onto what, and what learns from it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn.registration_losses import squared_lncc
from nnssl_ext.nn.warp import warp
from nnssl_ext.trainers.gvsl import GVSLTrainer
from tests.make_data import TINY_SHAPE, ArrayStore, tiny_plan


def make(folder, cases=8, channels=1, patch=(16, 16, 16), **options):
    config = GVSLTrainer.Config(**{"batch_size": 2, "workers": 0, **options})
    trainer = GVSLTrainer(tiny_plan(channels, patch), "3d_fullres", config, ArrayStore(cases, TINY_SHAPE, channels), folder)
    trainer.initialize()
    return trainer


def batch(trainer):
    return trainer._dataset(trainer.train_cases, "train")[0]


def test_an_untrained_network_moves_hardly_anything(tmp_path):
    trainer = make(tmp_path, channels=2, patch=(8, 24, 16))
    views = batch(trainer)
    with torch.no_grad():
        restored, flow, displacement = trainer.model(views["image"].image, views["moving"].image)
    assert restored.shape == (2, 2, 8, 24, 16) and flow.shape == displacement.shape == (2, 3, 8, 24, 16)
    assert 0 < float(displacement.abs().max()) < 0.01
    torch.testing.assert_close(warp(views["moving"].image, displacement), views["moving"].image, rtol=0, atol=0.01)


def test_affine_parameters_and_flow_get_gradients_from_the_correlation_alone(tmp_path):
    trainer = make(tmp_path, restoration=0.0, smoothness=0.0)
    trainer.step(trainer.model, batch(trainer))["total"].backward()
    model = trainer.model
    for layer in (model.affine.linear, model.flow.flow):
        assert bool((layer.weight.grad.flatten(1) != 0).any(1).all()) and bool((layer.bias.grad != 0).all())  # each parameter, each axis
    assert not model.head.weight.grad.any()
    assert all(bool(p.grad.any()) for p in model.backbone.net.encoder.stem.parameters() if p.ndim > 1)


def test_the_moving_crop_is_compared_with_the_clean_one_and_restored_is_the_corrupted_one(tmp_path):
    trainer = make(tmp_path)
    views, seen = batch(trainer), []
    trainer.model.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    with torch.no_grad():
        losses = trainer.step(trainer.model, views)
    (fixed, moving), (restored, _, displacement) = seen[0]
    assert torch.equal(fixed, views["image"].image) and torch.equal(moving, views["moving"].image)
    assert losses["similarity"].item() == pytest.approx(1 - squared_lncc(warp(moving, displacement), views["target"].image).item())
    assert losses["restoration"].item() == pytest.approx(float((restored - views["target"].image).square().mean()))
    assert losses["total"].item() == pytest.approx(sum(losses[name].item() for name in ("similarity", "restoration", "smoothness")))


def test_the_moving_crop_is_of_another_subject(tmp_path):
    trainer = make(tmp_path)
    views = batch(trainer)
    assert all(a != b for a, b in zip(views["target"].cases, views["moving"].cases)) and views["image"].cases == views["target"].cases
    assert set(views["moving"].cases) <= set(trainer.train_cases)


def test_a_shifted_copy_is_found_within_sixty_steps(tmp_path):
    torch.manual_seed(0)
    trainer = make(tmp_path, restoration=0.0)
    whole = torch.nn.functional.interpolate(torch.randn(2, 1, 7, 7, 7), size=(20, 20, 20), mode="trilinear")
    views, shift = batch(trainer), 2
    fixed, moving = whole[:, :, 2:18, 2:18, 2:18], whole[:, :, 2 - shift : 18 - shift, 2:18, 2:18]
    views = {name: replace(views[name], image=moving if name == "moving" else fixed) for name in views}
    optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=3e-3)
    similar = []
    for _ in range(60):
        optimizer.zero_grad()
        losses = trainer.step(trainer.model, views)
        losses["total"].backward()
        optimizer.step()
        similar.append(1 - losses["similarity"].item())
    assert similar[-1] > 0.8 and similar[-1] > similar[0] + 0.3
    with torch.no_grad():
        displacement = trainer.model(fixed, moving)[2]
    assert float(displacement[:, 0, 4:-4, 4:-4, 4:-4].mean()) == pytest.approx(shift, abs=0.5)


def test_a_single_sample_is_enough(tmp_path):
    trainer = make(tmp_path, batch_size=1)
    assert torch.isfinite(trainer.step(trainer.model, batch(trainer))["total"])


def test_a_single_subject_is_refused_in_one_clear_message(tmp_path):
    trainer = make(tmp_path)
    trainer.store.subject = lambda case: "a"
    with pytest.raises(UserError, match="GVSLTrainer needs cases of two subjects") as error:
        trainer.views()
    assert len(str(error.value).splitlines()) == 3


def test_pictures_show_both_crops_what_becomes_of_them_and_how_far_voxels_move(tmp_path):
    trainer = make(tmp_path)
    views = batch(trainer)
    with torch.no_grad():
        rows = trainer.picture(views)
    assert len(rows) == 2 and list(rows[0]) == ["fixed", "seen", "restored", "moving", "warped", "flow"]
    assert np.array_equal(rows[1]["moving"], views["moving"].image[1, 0].numpy())
    assert rows[0]["flow"].shape == (16, 16, 16, 3) and max(row["flow"].max() for row in rows) == pytest.approx(1)
