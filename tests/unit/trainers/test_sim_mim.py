"""SimMIM: a learned token stands for what is hidden, and nothing of what is hidden passes."""

import dataclasses

import pytest
import torch
from torch import nn

from nnssl_ext.nn.tokens import voxel_mask
from nnssl_ext.trainers.sim_mim import SimMIMTrainer
from tests.make_data import ArrayStore, make_plan, tiny_plan

FAMILIES, PATCH = ["primus", "primus_v2", "resenc"], (16, 24, 32)


def make(family, folder, channels=1, patch=PATCH, **options):
    """A trainer with its model in fp64, and a batch."""
    plan = tiny_plan(channels)
    config = plan.configuration("3d_fullres")
    networks = {**config.networks, "primus_v2": make_plan(channels=channels).configuration("3d_fullres").network("primus_v2")}
    small = {**networks["primus"].kwargs, "patch_embed_size": [8, 8, 8]}
    networks["primus_v2"] = dataclasses.replace(networks["primus_v2"], kwargs=small, batch_size=2)
    plan = dataclasses.replace(plan, configurations={"3d_fullres": dataclasses.replace(config, patch_size=patch, networks=networks)})
    trainer = SimMIMTrainer(plan, "3d_fullres", SimMIMTrainer.Config(batch_size=2, **options), ArrayStore(channels=channels), folder, family=family)
    trainer.initialize()
    trainer.model.double().eval()
    view = trainer._dataset(trainer.train_cases, "train")[0]["image"]
    return trainer, dataclasses.replace(view, image=view.image.double())


def voxels(view):
    return voxel_mask(view.mask, view.image.shape[2:]).expand_as(view.image)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_voxels_have_no_influence_and_no_gradient_even_where_they_are_nan(family, channels, tmp_path):
    trainer, view = make(family, tmp_path, channels)
    hidden, image = voxels(view), view.image.clone().requires_grad_()
    output = trainer.model(image, view.mask)
    output.square().sum().backward()
    assert bool((image.grad[hidden] == 0).all()) and bool((image.grad[~hidden] != 0).any())
    assert torch.equal(trainer.model(view.image.masked_fill(hidden, torch.nan), view.mask), output)
    assert not torch.equal(trainer.model(torch.where(hidden, view.image, 1.0), view.mask), output)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_token_has_a_gradient_of_zero_if_and_only_if_nothing_is_hidden(family, tmp_path):
    trainer, view = make(family, tmp_path)
    one = torch.zeros_like(view.mask)
    one[0, 0, 0, 0] = True
    for mask, learns in ((view.mask, True), (one, True), (torch.zeros_like(one), False)):
        (gradient,) = torch.autograd.grad(trainer.model(view.image, mask).square().sum(), trainer.model.mask_token)
        assert bool((gradient != 0).all()) == learns and bool((gradient == 0).all()) != learns
    assert torch.equal(trainer.model(view.image, torch.zeros_like(one)), type(trainer.model).__mro__[1].forward(trainer.model, view.image))


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_encoded_and_the_token_is_all_that_tells_hidden_places(family, tmp_path):
    trainer, view = make(family, tmp_path)
    before = trainer.model(view.image, view.mask)
    with torch.no_grad():
        trainer.model.mask_token += 1
    assert before.shape == view.image.shape and not torch.equal(trainer.model(view.image, view.mask), before)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("family", ["primus", "resenc"])
def test_predicting_zero_costs_the_mean_magnitude_or_square_of_the_hidden_voxels(family, channels, squared, tmp_path):
    trainer, view = make(family, tmp_path, channels, squared=squared)
    nn.init.zeros_(trainer.model.head.weight)
    nn.init.zeros_(trainer.model.head.bias)
    values = view.image[voxels(view)]
    expected = values.square().mean() if squared else values.abs().mean()
    assert trainer.step(trainer.model, {"image": view})["total"].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_has_no_gradient_on_visible_outputs(family, tmp_path):
    trainer, view = make(family, tmp_path)
    output = torch.randn_like(view.image).requires_grad_()
    trainer.step(lambda *_: output, {"image": view})["total"].backward()
    hidden = voxels(view)
    assert bool((output.grad[~hidden] == 0).all()) and bool((output.grad[hidden] != 0).all())


def test_blocks_are_thirty_two_voxels_of_whole_tokens_and_smaller_in_small_patches(tmp_path):
    def spec(family, patch, **options):
        return make(family, tmp_path, patch=patch, **options)[0].views()

    small = {"patch": (32, 64, 48)}
    assert spec("resenc", **small).block == (8, 16, 12) and spec("resenc", **small).cell is None
    assert spec("primus", **small).block == (8, 16, 12) and spec("primus", **small).cell == (4, 4, 4)
    assert spec("primus_v2", **small).block == (8, 16, 8) and spec("primus_v2", **small).cell == (8, 8, 8)
    assert spec("primus", mask_block=8, **small).block == (8, 8, 8)


def test_hidden_tokens_come_in_whole_blocks_and_their_share_is_exact(tmp_path):
    trainer, view = make("primus", tmp_path, patch=(32, 64, 48))  # 2 x 4 x 3 tokens in a block, 4 x 4 x 4 blocks
    assert view.mask.shape == (2, 8, 16, 12)
    blocks = view.mask.reshape(2, 4, 2, 4, 4, 4, 3).transpose(2, 3).transpose(4, 5).transpose(3, 4).flatten(4)
    assert torch.equal(blocks.any(-1), blocks.all(-1)) and blocks.any(-1).flatten(1).sum(1).tolist() == [38, 38]  # round(.6 * 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_show_crop_visible_part_and_reconstruction(family, tmp_path):
    trainer, view = make(family, tmp_path)
    with torch.no_grad():
        rows = trainer.picture({"image": view})
    hidden = voxels(view)[0, 0].numpy()
    assert len(rows) == 2 and list(rows[0]) == ["crop", "visible", "reconstruction"]
    assert (rows[0]["reconstruction"][~hidden] == rows[0]["crop"][~hidden]).all() and (rows[0]["reconstruction"][hidden] != rows[0]["crop"][hidden]).all()
