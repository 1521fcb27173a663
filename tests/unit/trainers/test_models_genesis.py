"""Models Genesis: what is spoilt how often, and that the whole crop is restored."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from nnssl_ext.core.rng import sample_rng
from nnssl_ext.trainers import models_genesis
from nnssl_ext.trainers.models_genesis import ModelsGenesisTrainer, spoil
from tests.make_data import ArrayStore, tiny_plan

FAMILIES, PATCHES, CHANNELS, SAMPLES = ["resenc", "primus"], [(16, 16, 16), (8, 12, 20)], [1, 3], 1000


def make(folder, family="resenc", channels=1, patch=(16, 16, 16), **options):
    plan = tiny_plan(channels)
    config = dataclasses.replace(plan.configurations["3d_fullres"], patch_size=patch)
    plan = dataclasses.replace(plan, configurations={"3d_fullres": config})
    config = ModelsGenesisTrainer.Config(batch_size=2, **options)
    return ModelsGenesisTrainer(plan, "3d_fullres", config, ArrayStore(channels=channels), folder, family=family)


def batch_of(trainer):
    trainer.initialize()
    trainer.model.eval()
    return trainer._dataset(trainer.train_cases, "train")[0]


def within(count, share, samples=SAMPLES):
    """Four standard deviations of a binomial number."""
    return abs(count - share * samples) <= 4 * (share * (1 - share) * samples) ** 0.5


def test_each_corruption_is_as_frequent_as_the_paper_says(monkeypatch, tmp_path):
    calls = Counter()
    for name in ("shuffle", "bezier", "paint_in", "paint_out"):
        monkeypatch.setattr(models_genesis, name, lambda image, rng, *_, name=name: calls.update([name]) or image)
    store, spec, mirrored = ArrayStore(1), make(tmp_path).views(), 0
    for i in range(SAMPLES):
        target = spec.sample(store, 0, sample_rng(0, i))["target"]
        mirrored += bool((np.diag(target.affine) < 0).any())
    assert within(calls["shuffle"], 0.5) and within(calls["bezier"], 0.9)
    assert within(calls["paint_in"] + calls["paint_out"], 0.9) and within(calls["paint_out"], 0.9 * 0.8)
    assert within(mirrored, 0.4 * 7 / 8)  # each axis half of the time, so that one of eight has none


def test_corruptions_are_independent_of_each_other_and_come_in_the_papers_order(monkeypatch):
    calls, together = [], Counter()
    for name in ("shuffle", "bezier", "paint_in", "paint_out"):
        monkeypatch.setattr(models_genesis, name, lambda image, rng, *_, name=name: calls.append(name.split("_")[0]) or image)
    for i in range(SAMPLES):
        calls.clear()
        spoil(np.zeros((1, 8, 8, 8), np.float32), sample_rng(1, i), ModelsGenesisTrainer.Config())
        together[tuple(calls)] += 1
    for order, share in {("shuffle", "bezier", "paint"): 0.405, ("bezier", "paint"): 0.405, ("shuffle", "paint"): 0.045, (): 0.005}.items():
        assert within(together[order], share)
    assert all(list(order) == sorted(order, key=["shuffle", "bezier", "paint"].index) for order in together)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_the_target_is_the_mirrored_crop_bit_for_bit(patch, channels, tmp_path):
    store, spec = ArrayStore(channels=channels), make(tmp_path, channels=channels, patch=patch).views()
    for i in range(30):
        views = spec.sample(store, 1, sample_rng(2, i))
        target = views["target"]
        last = target.affine[:, :3] @ (np.array(patch) - 1) + target.affine[:, 3]  # voxel of the case at the far corner
        box = [(int(min(a, b)), int(max(a, b)) + 1) for a, b in zip(target.affine[:, 3], last)]
        mirrored = [axis + 1 for axis in range(3) if target.affine[axis, axis] < 0]  # never the channels
        assert np.array_equal(target.image, np.flip(store.read(1, box), mirrored))
        assert np.array_equal(views["image"].affine, target.affine) and views["image"].image.shape == (channels, *patch)


def test_a_crop_that_nothing_spoils_is_its_own_target(tmp_path):
    views = make(tmp_path, mirror=0.0, shuffle=0.0, bezier=0.0, paint=0.0).views().sample(ArrayStore(), 0, sample_rng(3, 0))
    assert np.array_equal(views["image"].image, views["target"].image)
    assert (np.diag(views["target"].affine) == 1).all()


@pytest.mark.parametrize("options", [{"shuffle": 1.0}, {"bezier": 1.0}, {"paint": 1.0}, {"paint": 1.0, "outer": 0.0}], ids=str)
@pytest.mark.parametrize("shape", [(16, 16, 16), (8, 12, 40), (1, 20, 20)], ids=str)
def test_every_corruption_changes_every_channel_of_z_scored_data(options, shape):
    off = {"shuffle": 0.0, "bezier": 0.0, "paint": 0.0}
    image = sample_rng(4, 0).standard_normal((4, *shape), np.float32) * 3 - 1
    result = spoil(image, sample_rng(4, 1), ModelsGenesisTrainer.Config(**{**off, **options}))
    changed = (result != image).mean((1, 2, 3))
    assert (changed > 0).all() and np.isfinite(result).all() and np.abs(result).max() < 50


def test_windows_are_a_tenth_of_the_crop_or_two_voxels_along_each_axis_at_most(monkeypatch):
    asked = []
    monkeypatch.setattr(models_genesis, "shuffle", lambda image, rng, windows, edges: asked.append((windows, edges)) or image)
    spoil(np.zeros((2, 7, 64, 96), np.float32), sample_rng(5, 0), ModelsGenesisTrainer.Config(shuffle=1.0))
    (windows, (smallest, largest)), *_ = asked
    assert windows == 1000 and smallest == 1 and largest.tolist() == [2, 6, 9]


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("patch", PATCHES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_restoring_zeros_costs_the_mean_square_of_the_clean_crop(family, patch, channels, tmp_path):
    trainer = make(tmp_path, family, channels, patch)
    batch = batch_of(trainer)
    for parameter in trainer.model.head.parameters():
        nn.init.zeros_(parameter)
    expected = batch["target"].image.double().square().mean().item()
    assert trainer.step(trainer.model, batch)["total"].item() == pytest.approx(expected, rel=1e-5)
    assert trainer.model(batch["image"].image).shape == batch["target"].image.shape


@pytest.mark.parametrize("family", FAMILIES)
def test_every_voxel_of_every_channel_is_counted_and_the_target_is_never_seen(family, tmp_path):
    trainer = make(tmp_path, family, 3)
    batch = batch_of(trainer)
    restored, target = trainer.model(batch["image"].image), batch["target"].image.clone().requires_grad_()
    loss = trainer.step(trainer.model, {**batch, "target": dataclasses.replace(batch["target"], image=target)})["total"]
    (gradient,) = torch.autograd.grad(loss, target)
    assert torch.allclose(gradient, 2 * (target - restored).detach() / target.numel(), atol=1e-7)  # nothing but the error: the network doesn't read the target


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_handed_over_learns_encoder_and_where_there_is_one_decoder(family, tmp_path):
    trainer = make(tmp_path, family)
    batch = batch_of(trainer)
    trainer.step(trainer.model, batch)["total"].backward()
    moved = {name.split(".")[0] for name, parameter in trainer.transferred().net.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert moved == ({"encoder", "decoder"} if family == "resenc" else {"down_projection", "eva"})


def test_pictures_show_the_crop_what_was_made_of_it_and_what_the_network_restores(tmp_path):
    trainer = make(tmp_path, "primus", patch=(8, 12, 20))
    batch = batch_of(trainer)
    with torch.no_grad():
        rows = trainer.picture(batch)
        restored = trainer.model(batch["image"].image)
    assert [list(row) for row in rows] == [["crop", "spoilt", "restored"]] * 2
    for i, row in enumerate(rows):
        for shown, volume in zip(row.values(), (batch["target"].image, batch["image"].image, restored)):
            assert np.allclose(shown, volume[i, 0], atol=1e-6)
