"""SparkMAE: blocks that fit the encoder, errors known from the plan, and the same losses however it is run."""

import dataclasses
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.masking import block_grid, stride_block
from nnssl_ext.nn import parallel
from nnssl_ext.nn.backbones.base import build_backbone
from nnssl_ext.trainers.spark_mae import SparkMAETrainer
from tests.make_data import ArrayStore, tiny_plan
from tests.toy_trainers import trained

FOUR = {
    "n_stages": 4,
    "features_per_stage": [8, 16, 16, 16],
    "kernel_sizes": [[3, 3, 3]] * 4,
    "n_blocks_per_stage": [1] * 4,
    "n_conv_per_stage_decoder": [1] * 3,
}
DEEP = {**FOUR, "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]}
FLAT = {**FOUR, "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]]}


def make(folder, kwargs=None, patch=(16, 16, 16), channels=1, **options):
    plan = tiny_plan(channels)
    config = plan.configuration("3d_fullres")
    network = dataclasses.replace(config.network("resenc"), kwargs={**config.network("resenc").kwargs, **(kwargs or {})})
    plan = dataclasses.replace(plan, configurations={"3d_fullres": dataclasses.replace(config, patch_size=patch, networks={"resenc": network})})
    chosen = SparkMAETrainer.Config(**{"epochs": 1, "iterations": 4, "batch_size": 2, "workers": 0, **options})
    return SparkMAETrainer(plan, "3d_fullres", chosen, ArrayStore(8, (20, 36, 40), channels), folder)


def ready(*arguments, **options):
    trainer = make(*arguments, **options)
    trainer.initialize()
    trainer.waited = 0.0
    return trainer


@pytest.mark.parametrize(
    ("patch", "strides", "block"),
    [
        ((96, 96, 96), [(1, 1, 1), (16, 16, 16), (32, 32, 32)], (32, 32, 32)),  # 27 blocks are enough
        ((96, 96, 64), [(1, 1, 1), (16, 16, 16), (32, 32, 32)], (16, 16, 16)),
        ((20, 320, 256), [(1, 1, 1), (1, 2, 2), (4, 64, 64)], (4, 64, 64)),
        ((2, 2, 2), [(1, 1, 1), (2, 2, 2)], (1, 1, 1)),
    ],
)
def test_a_block_is_the_coarsest_stride_of_which_the_patch_holds_27(patch, strides, block):
    assert stride_block(patch, strides) == block


@pytest.mark.parametrize(
    ("kwargs", "patch", "block"), [(None, (16, 16, 16), (4, 4, 4)), (DEEP, (16, 16, 16), (4, 4, 4)), (FLAT, (4, 32, 16), (2, 4, 4))], ids=str
)
def test_every_mask_hides_the_same_share_of_blocks(kwargs, patch, block, tmp_path):
    trainer = make(tmp_path, kwargs, patch)
    grid, spec = block_grid(patch, block), trainer.views()
    masks = [spec.sample(trainer.store, 0, sample_rng(0, number))["image"].mask for number in range(5)]
    assert {mask.shape for mask in masks} == {grid} and {int(mask.sum()) for mask in masks} == {round(0.6 * np.prod(grid))}
    assert len({mask.tobytes() for mask in masks}) == 5


def test_a_plan_that_could_leave_the_deepest_level_one_active_cell_is_refused_before_training(tmp_path):
    make(tmp_path, mask_ratio=0.95).views()  # 3 of 64 blocks are visible, each a cell
    with pytest.raises(UserError, match="as few as 1 active cell of 4x4x4 voxels") as error:
        make(tmp_path, mask_ratio=0.98).initialize()
    assert len(str(error.value).splitlines()) <= 3
    make(tmp_path, DEEP, mask_ratio=0.85).views()  # 10 of 64 blocks: not all in one of 8 cells
    with pytest.raises(UserError, match="as few as 1 active cell of 8x8x8 voxels"):
        make(tmp_path, DEEP, mask_ratio=0.875).views()  # 8


def test_the_fewest_active_cells_that_are_assumed_are_those_of_the_worst_mask(tmp_path):
    cells = np.arange(8).reshape(2, 4) // 4  # cells of four blocks
    for visible in range(1, 8):
        worst = min(len(set(cells.flat[list(chosen)])) for chosen in combinations(range(8), visible))
        assert worst == -(-visible // 4)


def test_the_share_of_active_cells_is_noted_for_every_level(tmp_path):
    trainer = ready(tmp_path, DEEP)
    trained(trainer, 1)
    shares = [float(trainer.health.sums[f"active/level_{level}"][1]) for level in range(4)]
    mask = trainer.batch["image"].mask
    cells = [not mask[b, 2 * z : 2 * z + 2, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].all() for b in range(2) for z in range(2) for y in range(2) for x in range(2)]
    assert shares == pytest.approx([26 / 64] * 3 + [sum(cells) / 16])


@pytest.mark.parametrize(("kwargs", "patch", "channels"), [(DEEP, (16, 16, 16), 1), (FLAT, (4, 32, 16), 2)], ids=["deep", "flat"])
def test_hidden_voxels_have_no_influence_and_no_gradient(kwargs, patch, channels, tmp_path):
    trainer = ready(tmp_path, kwargs, patch, channels)
    trainer.model.eval()
    for parameter in trainer.backbone.parameters():  # at first the residual branches are silent
        nn.init.normal_(parameter, std=0.2)
    view = trainer._dataset(trainer.train_cases, "train")[0]["image"]
    image = view.image.clone().requires_grad_()
    output, hidden, _ = trainer.model(image, view.mask)
    assert output.shape == image.shape == (2, channels, *patch)
    output.square().sum().backward()
    everywhere = hidden.expand_as(image)
    assert bool((image.grad[everywhere] == 0).all()) and bool((image.grad[~everywhere] != 0).any())
    assert torch.equal(trainer.model.reconstruct(torch.where(hidden, torch.nan, view.image), view.mask), output)
    assert not torch.allclose(trainer.model.from_maps(trainer.backbone.pyramid(view.image.masked_fill(hidden, 0.0))), output, atol=0.01)


def test_predicting_zero_costs_the_mean_square_of_the_hidden_voxels(tmp_path):
    trainer = ready(tmp_path, FLAT, (4, 32, 16), 2)
    nn.init.zeros_(trainer.model.head.weight)
    nn.init.zeros_(trainer.model.head.bias)
    batch = {name: view.to(trainer.device) for name, view in trainer._dataset(trainer.train_cases, "train")[0].items()}
    hidden = trainer.model(batch["image"].image, batch["image"].mask)[1].expand_as(batch["image"].image)
    assert trainer.step(trainer.model, batch)["total"].item() == pytest.approx(batch["image"].image[hidden].square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_changes_no_bit_of_losses_gradients_and_weights(precision, tmp_path):
    plain, again = (ready(tmp_path, recompute=on, precision=precision) for on in (False, True))
    assert trained(plain) == trained(again)
    assert list(plain.model.state_dict()) == list(again.model.state_dict())
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in plain.model.state_dict().items())


def test_recomputed_stages_are_computed_twice(tmp_path):
    trainer, calls = ready(tmp_path, recompute=True), []
    part = next(part for part in parallel.parts(trainer.backbone) if hasattr(part, "blocks"))
    part.blocks[0].conv1.conv.register_forward_pre_hook(lambda *_: calls.append(1))
    trained(trainer, 3)
    assert len(calls) == 2 * 3


def test_compiled_stages_compute_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, compiled = (ready(tmp_path, compile=on) for on in (False, True))
    assert "warning" not in capsys.readouterr().out
    torch.testing.assert_close(torch.tensor(trained(compiled, 2)), torch.tensor(trained(plain, 2)), rtol=1e-4, atol=0)


def test_the_trained_encoder_is_an_ordinary_one(tmp_path):
    trainer = ready(tmp_path, FLAT, (4, 32, 16), 2)
    trained(trainer, 2)
    fresh = build_backbone(trainer.config_plan, "resenc", 2)
    fresh.net.load_state_dict(trainer.backbone.network_weights(), strict=True)
    assert trainer.state()["transfer"] == "encoder"
    image = torch.randn(1, 2, 4, 32, 16)
    for one, other in zip(fresh.eval().net.encoder(image), trainer.backbone.eval().pyramid(image)):
        assert torch.equal(one, other)
