"""MAE: what is hidden stays hidden, and the loss is the mean over hidden voxels."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.masking import block_grid
from nnssl_ext.nn.losses import masked_mse
from nnssl_ext.nn.tokens import block_moments, voxel_mask
from nnssl_ext.trainers.mae import MAETrainer
from tests.make_data import ArrayStore, make_plan

FAMILIES, CHANNELS, PATCHES = ["resenc", "primus"], [1, 4], [(32, 32, 32), (16, 32, 48)]


def make(family, channels, patch, tmp_path, **options):
    plan = make_plan(channels=channels)
    config = dataclasses.replace(plan.configurations["3d_fullres"], patch_size=patch)
    plan = dataclasses.replace(plan, configurations={"3d_fullres": config})
    trainer = MAETrainer(plan, "3d_fullres", MAETrainer.Config(batch_size=2, **options), ArrayStore(channels=channels), tmp_path, family=family)
    trainer.initialize()
    trainer.model.eval()
    view = trainer._dataset(trainer.train_cases, "train")[0]["image"]
    return trainer, view


@pytest.fixture(params=[(f, c, p) for f in FAMILIES for c in CHANNELS for p in PATCHES], ids=str)
def case(request, tmp_path):
    return (*request.param, *make(*request.param, tmp_path))


def test_hidden_voxels_have_no_influence_on_the_output_and_no_gradient(case):
    family, _, _, trainer, view = case
    hidden = voxel_mask(view.mask, view.image.shape[2:]).expand_as(view.image)
    image = view.image.clone().requires_grad_()
    output = trainer.model.reconstruct(image, view.mask)
    output.square().sum().backward()
    assert bool((image.grad[hidden] == 0).all()) and bool((image.grad[~hidden] != 0).any())
    changed = torch.where(hidden, torch.full_like(view.image, torch.nan), view.image)
    assert torch.equal(trainer.model.reconstruct(changed, view.mask), output)


def test_the_masked_share_and_the_voxel_mask_agree_with_the_view(case):
    family, _, patch, trainer, view = case
    block = trainer.views().block
    assert view.mask.shape[1:] == block_grid(patch, block)
    assert view.mask.float().mean().item() == pytest.approx(0.75, abs=0.02)
    assert voxel_mask(view.mask, patch).float().mean().item() == pytest.approx(0.75, abs=0.02)


def test_predicting_zero_costs_the_mean_square_of_the_hidden_voxels(case):
    _, _, _, trainer, view = case
    for layer in [trainer.model.head]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    hidden = voxel_mask(view.mask, view.image.shape[2:]).expand_as(view.image)
    expected = view.image[hidden].double().square().mean().item()
    assert trainer.step(trainer.model, {"image": view})["total"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_has_no_gradient_on_visible_outputs(family, tmp_path):
    trainer, view = make(family, 4, (16, 32, 48), tmp_path)
    hidden = voxel_mask(view.mask, view.image.shape[2:]).expand_as(view.image)
    head, outputs = trainer.model.head, []
    head.register_forward_hook(lambda module, inputs, output: outputs.append(output) or output.retain_grad())
    trainer.step(trainer.model, {"image": view})["total"].backward()
    (gradient,) = (output.grad for output in outputs)
    if family == "resenc":
        assert bool((gradient[~hidden] == 0).all()) and bool((gradient[hidden] != 0).all())
    else:  # nothing visible is predicted at all
        assert gradient.shape[1] == int(view.mask[0].sum()) and bool((gradient != 0).all())


def normalised(view, blocks):
    """Target and hidden voxels, block by block and channel by channel, in fp64."""
    image, target, hidden = view.image.double(), torch.full_like(view.image, torch.nan).double(), torch.zeros_like(view.image, dtype=torch.bool)
    for b, c, z, y, x in np.ndindex(*image.shape[:2], *view.mask.shape[1:]):
        block = (b, c, *(slice(p * e, (p + 1) * e) for p, e in zip((z, y, x), blocks)))
        values = image[block]
        target[block] = (values - values.mean()) / (values.var(correction=0) + 1e-6).sqrt()
        hidden[block] = view.mask[b, z, y, x]
    return target, hidden


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_normalised_targets_are_those_of_plain_loops_and_hidden_voxels_stay_without_influence(family, channels, tmp_path):
    trainer, view = make(family, channels, (16, 32, 48), tmp_path, normalise=True)
    target, hidden = normalised(view, trainer.views().block)
    prediction = trainer.model.reconstruct(view.image, view.mask)
    loss = (prediction.double() - target)[hidden].square().mean()
    assert trainer.step(trainer.model, {"image": view})["total"].item() == pytest.approx(loss.item(), rel=1e-4)
    changed = torch.where(hidden, 1e3 * torch.randn_like(view.image), view.image)
    assert torch.equal(trainer.model.reconstruct(changed, view.mask), prediction)
    for parameter in (trainer.model.head.weight, trainer.model.head.bias):
        nn.init.zeros_(parameter)
    assert trainer.step(trainer.model, {"image": view})["total"].item() == pytest.approx(target[hidden].square().mean().item(), rel=1e-4)
    assert target[hidden].square().mean().item() == pytest.approx(1, rel=1e-2)


def test_a_normalised_loss_does_not_see_brightness_and_contrast_of_a_block(tmp_path):
    trainer, view = make("primus", 1, (16, 32, 48), tmp_path, normalise=True)
    hidden = voxel_mask(view.mask, view.image.shape[2:])
    other = dataclasses.replace(view, image=torch.where(hidden, 3 * view.image - 2, view.image))
    first, second = (trainer.step(trainer.model, {"image": v})["total"].item() for v in (view, other))
    assert first == pytest.approx(second, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_normalised_predictions_are_on_the_scale_of_the_crop_and_say_what_they_were_given(family, tmp_path):
    trainer, view = make(family, 1, (16, 32, 48), tmp_path, normalise=True)
    for parameter in (trainer.model.head.weight, trainer.model.head.bias):
        nn.init.zeros_(parameter)
    with torch.no_grad():
        (row, _) = trainer.picture({"image": view})
    (caption,) = set(row) - {"crop", "visible"}
    assert "given" in caption
    hidden = voxel_mask(view.mask, (16, 32, 48))[0, 0].numpy()
    mean, _ = block_moments(view.image, view.mask.shape[1:])
    assert np.array_equal(row[caption], np.where(hidden, mean[0, 0].numpy(), row["crop"]))  # nothing but the means: what it predicts is zero


def test_the_training_loss_is_that_of_the_full_reconstruction(case):
    _, _, _, trainer, view = case
    full = masked_mse(trainer.model.reconstruct(view.image, view.mask), view.image, voxel_mask(view.mask, view.image.shape[2:]))
    assert trainer.step(trainer.model, {"image": view})["total"].item() == pytest.approx(full.item(), rel=1e-5)


def test_every_trained_parameter_is_part_of_the_graph_and_the_ends_learn(case):
    family, _, _, trainer, view = case
    trainer.step(trainer.model, {"image": view})["total"].backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert not [name for name, gradient in gradients.items() if gradient is None]
    ends = {"resenc": ["encoder.stem.convs.0.conv.weight", "decoder.stages.0.convs.0.conv.weight"], "primus": ["down_projection.proj.weight", "eva.pos_embed"]}
    assert all(bool(gradients[f"backbone.net.{name}"].any()) for name in ends[family])
    assert bool(gradients["head.weight"].any())


def test_token_ids_round_trip_into_the_voxel_mask():
    for number in range(24):  # grid 2 x 3 x 4
        mask = torch.zeros(1, 24, dtype=torch.bool)
        mask[0, number] = True
        voxels = voxel_mask(mask.reshape(1, 2, 3, 4), (8, 24, 64))[0, 0]
        z, y, x = np.unravel_index(number, (2, 3, 4))
        expected = torch.zeros(8, 24, 64, dtype=torch.bool)
        expected[4 * z : 4 * z + 4, 8 * y : 8 * y + 8, 16 * x : 16 * x + 16] = True
        assert torch.equal(voxels, expected)


def test_blocks_that_do_not_divide_the_patch_still_cover_it():
    for size in range(1, 70):
        for edge in range(1, size + 1):
            cells = -(-size // edge)
            voxels = voxel_mask(torch.arange(cells).reshape(1, cells, 1, 1) % 2 == 0, (size, 1, 1))
            assert voxels.shape[2] == size
            assert torch.unique_consecutive(voxels.flatten()).numel() == cells  # no block vanishes


@pytest.mark.parametrize("family", FAMILIES)
def test_thirty_steps_on_one_batch_overfit_it(family, tmp_path):
    torch.set_num_threads(2)
    trainer, view = make(family, 1, (32, 32, 32), tmp_path)
    trainer.model.train()
    optimizer = torch.optim.AdamW(trainer.model.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        loss = trainer.step(trainer.model, {"image": view})["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_constant_volume_gives_a_finite_loss(family, tmp_path):
    trainer, view = make(family, 1, (32, 32, 32), tmp_path)
    view.image = torch.full_like(view.image, 3.0)
    assert torch.isfinite(trainer.step(trainer.model, {"image": view})["total"])


def test_pictures_show_crop_visible_part_and_reconstruction(tmp_path):
    trainer, view = make("primus", 1, (16, 32, 48), tmp_path)
    with torch.no_grad():
        rows = trainer.picture({"image": view})
    assert len(rows) == 2 and list(rows[0]) == ["crop", "visible", "reconstruction"]
    hidden = voxel_mask(view.mask, (16, 32, 48))[0, 0].numpy()
    assert np.array_equal(rows[0]["reconstruction"][~hidden], rows[0]["crop"][~hidden])
    assert np.array_equal(rows[0]["visible"][~hidden], rows[0]["crop"][~hidden])
    assert len(np.unique(rows[0]["visible"][hidden])) == 1


def test_the_mask_differs_between_samples_and_steps(tmp_path):
    trainer, _ = make("primus", 1, (32, 32, 32), tmp_path)
    data = trainer._dataset(trainer.train_cases, "train")
    masks = [tuple(m.flatten().tolist()) for k in range(4) for m in data[k]["image"].mask]
    assert len(set(masks)) == len(masks)
    assert sample_rng(0, 1).integers(10**9) != sample_rng(0, 2).integers(10**9)
