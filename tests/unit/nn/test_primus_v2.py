"""Primus V2: the library's tokens, hidden voxels, and what a hand-off must know of its tokenizer."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.primus import PrimusV2
from torch import nn

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn.backbones.base import build_backbone
from nnssl_ext.nn.backbones.primus_v2 import PrimusV2Backbone
from nnssl_ext.nn.tokens import resize_positions
from nnssl_ext.trainers.checkpoint import load_checkpoint
from nnssl_ext.trainers.dinov2 import DINOv2Trainer
from tests.conformance.pairs import OPTIONS
from tests.make_data import make_plan, tiny_plan, tiny_store

CLASS = "dynamic_network_architectures.architectures.primus.PrimusV2"
KWARGS = {"embed_dim": 48, "eva_depth": 2, "eva_numheads": 2, "init_values": 0.1, "scale_attn_inner": True, "patch_embed_size": (8, 8, 8)}


def build(channels=1, **options):
    torch.manual_seed(0)
    backbone = PrimusV2Backbone(channels, (32, 32, 32), CLASS, {**KWARGS, **options}, ())
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    return backbone.eval()


@pytest.mark.parametrize("options", [{}, {"num_register_tokens": 4}], ids=str)
@pytest.mark.parametrize("size", [(32, 32, 32), (16, 24, 40)])
@torch.no_grad()
def test_the_weights_load_strictly_into_the_library_and_give_its_tokens(size, options):
    backbone, image = build(2, **options), torch.randn(2, 2, *size)
    net = PrimusV2(input_channels=2, num_classes=3, input_shape=size, **{**KWARGS, **options})
    weights = {key: value for key, value in net.state_dict().items() if key.startswith("up_projection.")} | backbone.network_weights()
    first = options.get("num_register_tokens", 0)
    positions = weights["eva.pos_embed"]
    weights["eva.pos_embed"] = torch.cat((positions[:, :first], resize_positions(positions[:, first:], (4, 4, 4), backbone.grid_of(size))), 1)
    net.load_state_dict(weights, strict=True)
    net.up_projection = nn.Identity()
    assert torch.allclose(backbone.pyramid(image)[0], net.eval()(image), atol=1e-5, rtol=1e-5)


def test_hidden_voxels_have_no_influence_on_any_token_even_where_they_are_nan():
    backbone, token = build(), nn.Parameter(torch.randn(48))
    mask = torch.rand(2, 30) < 0.5
    hidden = mask.reshape(2, 1, 2, 3, 5)
    for axis in (2, 3, 4):
        hidden = hidden.repeat_interleave(8, axis)
    image, results = torch.randn(2, 1, 16, 24, 40), []
    for value in (0.0, 5.0, float("nan")):
        backbone.zero_grad()
        features = backbone.tokens(image.masked_fill(hidden, value), mask=mask, mask_token=token)
        features.square().mean().backward()
        results.append([features.detach(), *(p.grad.clone() for p in backbone.parameters())])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert not torch.allclose(backbone.tokens(image), results[0][0])
    assert bool((backbone.tokens(image, mask=mask, mask_token=token + 1) != results[0][0]).any())


def test_trains_at_every_size_masked_and_unmasked():
    backbone, token = build(drop_path_rate=0.2).train(), nn.Parameter(torch.randn(48))
    for size in [(32, 32, 32), (16, 24, 40)]:
        mask = torch.rand(2, size[0] * size[1] * size[2] // 512) < 0.5
        for masked in ({}, {"mask": mask, "mask_token": token}):
            backbone.zero_grad()
            backbone.tokens(torch.randn(2, 1, *size), **masked).square().mean().backward()
            assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in backbone.parameters())


def test_the_input_projections_are_all_modules_that_read_the_image():
    backbone = build(3)
    keys, weights = backbone.adaptation(), backbone.network_weights()
    reading = {name.removesuffix(".weight") for name, value in weights.items() if value.ndim == 5 and value.shape[1] == 3}
    assert set(keys.in_proj) == reading and len(reading) == 4 and set(backbone.net.keys_to_in_proj) < reading
    assert (keys.encoder, keys.stem, keys.positions) == ("eva", "down_projection", "eva.pos_embed")


@torch.no_grad()
def test_an_image_repeated_over_channels_gives_the_same_tokens_when_these_projections_are_repeated():
    one, three = build(1), build(3)
    weights = one.network_weights()
    for key in one.adaptation().in_proj:
        weights[f"{key}.weight"] = weights[f"{key}.weight"].repeat(1, 3, 1, 1, 1) / 3
    three.net.load_state_dict(weights, strict=True)
    image = torch.randn(1, 1, 16, 16, 24)
    assert torch.allclose(three.tokens(image.expand(-1, 3, -1, -1, -1)), one.tokens(image), atol=1e-4)


def test_layer_ids_put_the_whole_tokenizer_below_the_blocks():
    backbone = build()
    ids = dict(backbone.layer_ids())
    assert len(ids) == len(backbone.layer_ids()) == len(list(backbone.parameters()))
    assert all(ids[parameter] == 0 for parameter in backbone.net.down_projection.parameters())
    assert all(ids[parameter] == 2 for parameter in backbone.net.eva.blocks[1].parameters())


def test_other_tokens_and_a_single_one_are_refused():
    with pytest.raises(UserError, match="8x8x8"):
        build(patch_embed_size=(4, 8, 8))
    with pytest.raises(UserError, match="single token"):
        build().tokens(torch.zeros(1, 1, 8, 8, 8))


def test_it_is_planned_where_tokens_are_cubes_of_eight_voxels():
    config = make_plan().configuration("3d_fullres")
    backbone = build_backbone(config, "primus_v2", 1)
    assert backbone.pooled(torch.randn(1, 1, *config.patch_size)).shape == (1, backbone.width) and "token_drop" not in backbone.supports
    flat = make_plan(spacings=((6.0, 3.0, 3.0),) * 8).configuration("3d_fullres")
    assert "primus_v2" in config.networks and set(flat.networks) == set(config.networks) - {"primus_v2"}


@torch.no_grad()
def test_a_neighbours_visible_voxels_reach_a_token_which_is_why_dropping_tokens_is_not_offered():
    backbone, image = build(), torch.randn(1, 1, 16, 16, 32)
    other = image.clone()
    other[..., 8:16] = F.dropout(other[..., 8:16], 0.5, training=True)
    embedded, changed = (backbone._embed(x, None, None) for x in (image, other))
    assert not torch.allclose(embedded[0, 0], changed[0, 0])


def test_self_distillation_trains_all_of_it_and_writes_what_a_hand_off_needs(tmp_path):
    plan, network = tiny_plan(), make_plan().configuration("3d_fullres").network("primus_v2")
    network = dataclasses.replace(network, kwargs={**network.kwargs, **KWARGS, "patch_embed_size": [8, 8, 8]}, batch_size=2)
    config = dataclasses.replace(plan.configuration("3d_fullres"), networks={"primus_v2": network})
    plan = dataclasses.replace(plan, configurations={"3d_fullres": config})
    short = {"epochs": 1, "iterations": 2, "val_iterations": 1, "batch_size": 2, "workers": 0, **OPTIONS["DINOv2Trainer"]}
    trainer = DINOv2Trainer(plan, "3d_fullres", DINOv2Trainer.Config(**short), tiny_store(), tmp_path, family="primus_v2")
    trainer.initialize()
    before = {key: value.clone() for key, value in trainer.backbone.network_weights().items()}
    trainer.fit()
    content = load_checkpoint(tmp_path / "checkpoint_final.pth")
    trained = {name for name, _ in trainer.backbone.net.named_parameters()}
    assert all(not torch.equal(content["network_weights"][name], before[name]) for name in trained)
    adaptation = content["nnssl_adaptation_plan"]
    assert adaptation["architecture_plans"]["arch_class_name"] == "PrimusV2" and len(adaptation["keys_to_in_proj"]) == 4
