"""Primus at any size: positions, hidden tokens, registers, and what the library makes of the same weights."""

import copy
import itertools
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import nn

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn.backbones.primus import PrimusBackbone

CLASS = "dynamic_network_architectures.architectures.primus.Primus"
KWARGS = {"embed_dim": 48, "eva_depth": 2, "eva_numheads": 2, "init_values": 0.1, "scale_attn_inner": True}
SIZES = [(32, 32, 32), (48, 48, 48), (96, 96, 96), (32, 48, 64)]
TOKENS = [(4, 4, 4), (8, 8, 8), (16, 16, 16), (4, 8, 8)]
OPTIONS = [{}, {"num_register_tokens": 4}, {"use_abs_pos_embed": False}, {"num_register_tokens": 2, "use_abs_pos_embed": False}, {"use_rot_pos_emb": False}]


def build(patch=(48, 48, 48), token=(8, 8, 8), channels=1, **options):
    torch.manual_seed(0)
    backbone = PrimusBackbone(channels, patch, CLASS, {**KWARGS, "patch_embed_size": token, **options}, ())
    for parameter in backbone.parameters():  # far from the initial values, among which biases and registers are about 0
        nn.init.normal_(parameter, std=0.2)
    return backbone.eval()


def library(backbone, patch):
    """The library's own network for that patch, with our weights; its decoder is taken out after the weights are in."""
    kwargs = {**KWARGS, **backbone.kwargs}
    net = import_module(CLASS.rpartition(".")[0]).Primus(input_channels=backbone.channels, num_classes=3, input_shape=patch, **kwargs)
    weights = {key: value for key, value in net.state_dict().items() if key.startswith("up_projection.")} | backbone.network_weights()
    if net.eva.pos_embed is not None:
        first = net.eva.num_prefix_tokens
        grid = [p // t for p, t in zip(patch, backbone.token)]
        volume = weights["eva.pos_embed"][:, first:].unflatten(1, backbone.grid).movedim(-1, 1)
        resized = F.interpolate(volume, size=grid, mode="trilinear", align_corners=False).flatten(2).transpose(1, 2)
        weights["eva.pos_embed"] = torch.cat((weights["eva.pos_embed"][:, :first], resized), 1)
    net.load_state_dict(weights, strict=True)
    net.up_projection = nn.Identity()
    return net.eval()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(48, 48, 48), (32, 48, 64), (16, 16, 16)])
@torch.no_grad()
def test_tokens_are_those_of_the_library_built_for_that_size(size, options):
    backbone, image = build(**options), torch.randn(2, 1, *size)
    assert torch.allclose(backbone.pyramid(image)[0], library(backbone, size)(image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("token", TOKENS)
@torch.no_grad()
def test_every_token_size_loads_strictly_into_the_library_and_gives_its_tokens(token):
    patch = tuple(3 * t for t in token)
    backbone, image = build(patch, token, channels=2), torch.randn(2, 2, *patch)
    expected = library(backbone, patch)(image).flatten(2).transpose(1, 2)
    assert torch.allclose(backbone.tokens(image), expected, atol=1e-5, rtol=1e-5)


def angles(grid, channels):
    """Rotary angles of each token by plain loops, (N, channels / 2): channels in pairs, a third of them per axis."""
    bands = channels // 6
    rows = []
    for place in itertools.product(*(range(n) for n in grid)):
        rows.append([place[axis] * 10000.0 ** (-k / bands) for axis in range(3) for k in range(bands)])
    return np.array(rows)


@pytest.mark.parametrize("grid", [(6, 6, 6), (4, 6, 8), (12, 12, 12), (1, 2, 13)])
def test_rotary_positions_advance_by_one_unit_per_token_at_every_size(grid):
    sines, cosines = build()._rotary(grid).chunk(2, -1)
    expected = angles(grid, 24).repeat(2, axis=1)
    assert np.allclose(sines, np.sin(expected), atol=2e-6) and np.allclose(cosines, np.cos(expected), atol=2e-6)


def test_rotary_positions_of_the_planned_patch_are_bitwise_the_librarys():
    backbone = build()
    assert torch.equal(backbone._rotary((6, 6, 6)), backbone.net.eva.rope.get_embed())
    assert torch.equal(build((32, 48, 64))._rotary((6, 6, 6)), backbone.net.eva.rope.get_embed())


def test_rotation_keeps_the_norm():
    table = build()._rotary((4, 6, 12))
    q = torch.randn(1, 1, len(table), 24)
    rotated = apply_rot_embed_cat(q, table)
    assert not torch.allclose(rotated[0, 0, 1:], q[0, 0, 1:], atol=1e-2)
    assert torch.allclose(rotated.norm(dim=-1), q.norm(dim=-1), rtol=1e-5)


@pytest.mark.parametrize("grid", [(6, 6, 6), (4, 5, 12)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shift_of_query_and_key_along_any_axis_leaves_their_product(grid, axis):
    q, k = F.normalize(torch.randn(2, 24), dim=-1)
    table = build()._rotary(grid)
    queries, keys = (apply_rot_embed_cat(v.expand(1, 1, len(table), -1), table)[0, 0].reshape(*grid, 24) for v in (q, k))
    queries, keys = (rotated.movedim(axis, 0)[:, 0, 0] for rotated in (queries, keys))
    products = queries @ keys.T  # depends on the difference of the positions alone: constant along diagonals
    assert all(diagonal.max() - diagonal.min() < 1e-5 for offset in range(1 - grid[axis], grid[axis]) for diagonal in [products.diagonal(offset)])
    assert products[0].std() > 1e-3


def first_input(backbone, image, **hidden):
    """What the first block gets, (B, N, C)."""
    seen = []
    hook = backbone.net.eva.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        backbone.tokens(image, **hidden)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("grid", [(6, 6, 6), (3, 3, 3), (12, 12, 12), (4, 6, 8), (3, 6, 12), (1, 6, 36)])  # the last two have 6^3 tokens, too
def test_learned_positions_are_bitwise_the_trilinear_interpolation(grid):
    backbone = build()
    nn.init.zeros_(backbone.net.down_projection.proj.weight)
    nn.init.zeros_(backbone.net.down_projection.proj.bias)
    learned = backbone.net.eva.pos_embed.detach()
    expected = F.interpolate(learned.transpose(1, 2).reshape(1, 48, 6, 6, 6), size=grid, mode="trilinear", align_corners=False)
    found = first_input(backbone, torch.randn(1, 1, *(8 * g for g in grid)))
    assert torch.equal(found, expected.flatten(2).transpose(1, 2)) and torch.equal(found, learned) == (grid == (6, 6, 6))


def hiding(backbone, size, share=0.5):
    """Voxels that are NaN where hidden, the mask (2, N) and a mask token."""
    grid = backbone.grid_of(size)
    mask = torch.rand(2, int(np.prod(grid))) < share
    mask[:, 0], mask[:, -1] = True, False
    voxels = mask.reshape(2, 1, *grid)
    for axis, t in enumerate(backbone.token, start=2):
        voxels = voxels.repeat_interleave(t, axis)
    return voxels, mask, nn.Parameter(torch.randn(backbone.width))


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_one_model_trains_at_every_size_masked_and_unmasked(options):
    backbone = build((96, 96, 96), drop_path_rate=0.2, **options).train()
    for size in SIZES:
        _, mask, token = hiding(backbone, size)
        image = torch.randn(2, 1, *size)
        for hidden in ({}, {"mask": mask, "mask_token": token}):
            backbone.zero_grad()
            features = backbone.tokens(image, **hidden)
            assert features.shape == (2, mask.shape[1], 48)
            features.square().mean().backward()
            assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in backbone.parameters())
            assert (token.grad is not None) == bool(hidden)


@pytest.mark.parametrize(("token", "size"), [((8, 8, 8), (48, 48, 48)), ((8, 8, 8), (32, 48, 64)), ((4, 8, 8), (16, 24, 32)), ((16, 16, 16), (32, 48, 64))])
def test_hidden_tokens_are_replaced_before_positions_are_added(token, size):
    backbone = build((48, 48, 48), token)
    _, mask, mask_token = hiding(backbone, size)
    image = torch.randn(2, 1, *size)
    plain = first_input(backbone, image)
    found = first_input(backbone, image, mask=mask, mask_token=mask_token)
    nn.init.zeros_(backbone.net.down_projection.proj.weight)
    nn.init.zeros_(backbone.net.down_projection.proj.bias)
    positions = first_input(backbone, image)
    for sample, row in itertools.product(range(2), range(mask.shape[1])):
        expected = mask_token + positions[0, row] if mask[sample, row] else plain[sample, row]
        assert torch.allclose(found[sample, row], expected, atol=1e-5)


def test_hidden_voxels_have_no_influence_on_features_and_gradients_even_where_they_are_nan():
    backbone = build()
    voxels, mask, token = hiding(backbone, (32, 48, 64))
    image = torch.randn(2, 1, 32, 48, 64)
    results = []
    for hidden in (0.0, 7.0, float("nan")):
        backbone.zero_grad()
        features = backbone.tokens(image.masked_fill(voxels, hidden), mask=mask, mask_token=token)
        features.square().mean().backward()
        results.append([features.detach(), *(p.grad.clone() for p in backbone.parameters())])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_mask_that_hides_nothing_changes_nothing():
    backbone, image = build(), torch.randn(2, 1, 32, 48, 64)
    mask = torch.zeros(2, 192, dtype=torch.bool)
    assert torch.equal(backbone.tokens(image, mask=mask, mask_token=torch.full((48,), 9.0)), backbone.tokens(image))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_keeping_tokens_works_at_every_size_and_with_every_option(options):
    backbone, image = build(**options), torch.randn(2, 1, 32, 48, 64)
    every = torch.arange(192).expand(2, -1)
    assert torch.allclose(backbone.tokens(image, every), backbone.tokens(image), atol=1e-5)
    order = torch.stack([torch.randperm(192) for _ in range(2)])
    shuffled = backbone.tokens(image, order)
    assert torch.allclose(shuffled, backbone.tokens(image).gather(1, order[..., None].expand(-1, -1, 48)), atol=1e-5)


@pytest.mark.parametrize("options", [{"num_register_tokens": 4}, {}], ids=str)
def test_dropped_samples_are_left_out_as_the_library_drops_them_with_masks_and_registers(options):
    backbone = build(drop_path_rate=0.5, **options).double().train()
    theirs = copy.deepcopy(backbone)
    for block in theirs.net.eva.blocks:
        del block.forward
    image, mask = torch.randn(4, 1, 16, 32, 24).double(), torch.rand(4, 24) < 0.5
    for seed in range(4):
        torch.manual_seed(seed)
        ours = backbone.tokens(image, mask=mask, mask_token=torch.ones(48).double())
        torch.manual_seed(seed)
        assert torch.allclose(ours, theirs.tokens(image, mask=mask, mask_token=torch.ones(48).double()), rtol=1e-10, atol=1e-12)


def test_an_input_that_the_token_does_not_divide_is_refused():
    for call in (build().tokens, build().pyramid, build(token=(16, 8, 8)).tokens):
        with pytest.raises(UserError, match="input size 40x32x33 is not divisible by the token size"):
            call(torch.zeros(1, 1, 40, 32, 33))


def test_positions_first_needed_in_inference_serve_training_and_stay_out_of_checkpoints():
    backbone, image = build(), torch.randn(1, 1, 16, 16, 24)
    before = set(backbone.state_dict())
    with torch.inference_mode():
        backbone.tokens(image)
    backbone.tokens(image).sum().backward()
    assert set(backbone.state_dict()) == before and backbone.tokens(image).requires_grad
    assert backbone.double().tokens(image.double()).dtype == torch.float64


def test_only_the_positions_of_the_latest_grids_are_kept():
    backbone = build()
    for edge in range(7, 60):
        backbone._rotary((1, 1, edge))
    assert len(backbone._tables) <= 16


def test_layer_ids_name_the_depth_of_every_parameter_once():
    backbone = build(num_register_tokens=4)
    names = {parameter: name for name, parameter in backbone.net.named_parameters()}
    found = {names[parameter]: layer for parameter, layer in backbone.layer_ids()}
    assert len(found) == len(backbone.layer_ids()) == len(list(backbone.parameters()))
    zero = {"down_projection.proj.weight", "down_projection.proj.bias", "eva.pos_embed", "register_tokens"}
    assert {name for name, layer in found.items() if layer == 0} == zero
    assert {name for name, layer in found.items() if layer == 3} == {"eva.norm.weight", "eva.norm.bias"}
    assert all(layer == int(name.split(".")[2]) + 1 for name, layer in found.items() if name.startswith("eva.blocks."))


def test_without_learned_positions_the_adaptation_plan_names_none():
    assert build(use_abs_pos_embed=False).adaptation().positions is None and build().adaptation().positions == "eva.pos_embed"
