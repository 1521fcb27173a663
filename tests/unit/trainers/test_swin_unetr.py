"""Swin UNETR's pretraining: what each head sees, what it is asked, and which crops it can turn."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from nnssl_ext.core.errors import UserError
from nnssl_ext.data.turned import Turning
from nnssl_ext.trainers.swin_unetr import SwinUNETRPretrainTrainer
from tests.conformance.pairs import Pair, first_batch
from tests.make_data import ArrayStore, tiny_plan, tiny_store

FAMILIES = ["resenc", "primus"]


def made(family, folder, **options):
    trainer = Pair(SwinUNETRPretrainTrainer, family).trainer(folder, **options)
    trainer.initialize()
    trainer.model.eval()
    return trainer


@pytest.fixture(params=FAMILIES)
def trainer(request, tmp_path):
    return made(request.param, tmp_path, batch_size=4)


def test_a_voxel_in_a_far_corner_changes_the_rotation_logits_and_the_contrasted_vector(trainer):
    image = torch.randn(1, 1, 16, 16, 16)
    for corner in [(0, 0, 0), (15, 15, 15), (0, 15, 0)]:
        other = image.clone()
        other[(0, 0, *corner)] += 5.0
        for before, after in list(zip(trainer.model(image), trainer.model(other)))[1:]:
            assert (before - after).abs().max() > 1e-6


def test_both_heads_are_linear_in_the_mean_of_the_deepest_map(trainer):
    image = torch.randn(2, 1, 16, 16, 16)
    pooled = trainer.model.norm(trainer.backbone.pooled(image))
    _, rotation, vectors = trainer.model(image)
    assert torch.allclose(rotation, trainer.model.rotation(pooled), atol=1e-6) and rotation.shape == (2, 4)
    assert torch.allclose(vectors, trainer.model.contrast(pooled), atol=1e-6) and vectors.shape == (2, 512)


def test_the_heads_of_a_unet_see_averages_that_differ_between_crops(tmp_path):
    model = made("resenc", tmp_path, batch_size=4).model.train()
    image = torch.randn(8, 1, 16, 16, 16)
    pooled = model.backbone.pooled(image)
    assert pooled.std(0).max() < 0.02 < 0.5 < model.norm(pooled).std(0).min()
    torch.testing.assert_close(model(image)[1], model.rotation((pooled - pooled.mean(0)) / (pooled.var(0, correction=0) + 1e-5).sqrt()))


def test_heads_that_know_nothing_cost_the_logarithm_of_their_choices(trainer):
    for layer in (trainer.model.rotation, trainer.model.contrast):
        nn.init.zeros_(layer.weight)
        nn.init.ones_(layer.bias)
    losses = trainer.step(trainer.model, first_batch(trainer))
    assert losses["rotation"].item() == pytest.approx(math.log(4), rel=1e-5)
    assert losses["contrast"].item() == pytest.approx(math.log(2 * 4 - 1), rel=1e-5)
    assert losses["total"].item() == pytest.approx(sum(losses[name].item() for name in ("reconstruction", "rotation", "contrast")), rel=1e-6)


def test_the_target_is_the_clean_crop_turned_back_by_the_label(trainer):
    batch = first_batch(trainer)
    seen, clean, times = trainer._versions(batch)
    assert seen.shape == clean.shape == (8, 1, 16, 16, 16) and len(set(times.tolist())) > 1
    for number in range(8):
        axes = tuple(axis + 1 for axis in trainer.turning.plane)
        assert torch.equal(clean[number].rot90(-int(times[number]), axes), batch["target"].image[number % 4])
    untouched = (seen == clean).float().mean().item()
    assert 0.4 <= untouched < 1.0  # 30 % noise and 30 % of another sample, at most


def test_without_noise_and_swapping_the_network_sees_the_turned_crops(tmp_path):
    trainer = made("primus", tmp_path, noise=0.0, swap=0.0)
    seen, clean, _ = trainer._versions(first_batch(trainer))
    assert torch.equal(seen, clean)


def test_crops_are_not_mirrored(tmp_path):
    trainer = made("primus", tmp_path)
    for step in range(4):
        matrices = first_batch(trainer, step)["target"].affine[:, :, :3]
        assert torch.equal(matrices, torch.eye(3, dtype=torch.float64).expand_as(matrices))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("patch", "spacing", "turning"),
    [
        ((8, 16, 24), (3.0, 1.0, 1.0), Turning((8, 16, 16), (1, 2), (0, 1, 2, 3))),
        ((8, 16, 24), (3.0, 1.0, 2.0), Turning((8, 16, 24), (1, 2), (0, 2))),
    ],
    ids=str,
)
def test_patches_that_are_no_cubes_are_cropped_to_a_square_or_turned_by_half(family, patch, spacing, turning, tmp_path):
    plan = tiny_plan(channels=2)
    config = dataclasses.replace(plan.configuration("3d_fullres"), patch_size=patch, spacing=spacing)
    plan = dataclasses.replace(plan, configurations={"3d_fullres": config})
    options = SwinUNETRPretrainTrainer.Config(batch_size=3, workers=0)
    store = ArrayStore(8, (20, 24, 26), channels=2, spacing=spacing)
    trainer = SwinUNETRPretrainTrainer(plan, "3d_fullres", options, store, tmp_path, family=family)
    assert trainer.turning == turning
    trainer.initialize()
    losses = trainer.step(trainer.model, first_batch(trainer))
    losses["total"].backward()
    assert first_batch(trainer)["image_0"].image.shape == (3, 2, *turning.size)
    assert all(bool(loss.isfinite()) for loss in losses.values())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trainer.model.parameters() if p.requires_grad)


def test_a_batch_of_one_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="SwinUNETRPretrainTrainer compares samples and needs two") as error:
        Pair(SwinUNETRPretrainTrainer, "primus").trainer(tmp_path, batch_size=1, store=tiny_store())
    assert len(str(error.value).splitlines()) <= 3
