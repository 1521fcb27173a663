"""All families behind one protocol."""

import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn.backbones.base import Backbone, build_backbone, check_support, families, feature_level
from tests.make_data import make_plan

CONFIG = make_plan().configurations["3d_fullres"]
FAMILIES = ["resenc", "primus", "segformer3d"]


def build(family: str, channels: int = 1, config=CONFIG) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(config, family, channels).eval()


@pytest.fixture
def image():
    return torch.randn(2, 1, *CONFIG.patch_size)


def test_all_families_are_found():
    assert set(families()) == {"resenc", "primus", "primus_v2", "segformer3d"}


def test_the_decoders_features_give_the_librarys_output(image):
    backbone = build("resenc")
    features = backbone.decode(backbone.pyramid(image))
    assert torch.equal(backbone.net.decoder.seg_layers[-1](features), backbone.net(image))


def test_the_decoder_of_a_segformer_is_interpolated_and_a_pointwise_layer_may_come_before(image):
    backbone, layer = build("segformer3d"), torch.nn.Conv3d(64, 3, 1)
    maps = backbone.pyramid(image)
    features = backbone.decode(maps)
    assert features.shape == (2, backbone.decoded, *CONFIG.patch_size) and backbone.decoded == 64
    assert torch.allclose(backbone.project(maps, layer), layer(features), atol=1e-5)
    assert torch.allclose(backbone.project(maps, backbone.net.decoder.seg_layers[0]), backbone.net(image), atol=1e-6)


@pytest.mark.parametrize("family", ["resenc", "segformer3d"])
def test_a_decoder_is_trained_where_a_method_wants_it_but_for_its_segmentation_layers(family, image):
    backbone = build(family)
    for on in (False, True):
        backbone.train_decoder(on)
        kinds = {name.split(".")[2]: parameter.requires_grad for name, parameter in backbone.named_parameters() if name.startswith("net.decoder.")}
        assert not kinds.pop("seg_layers") and all(trained == on for trained in kinds.values()) and kinds
    backbone.decode(backbone.pyramid(image)).sum().backward()
    assert [name for name, parameter in backbone.named_parameters() if parameter.requires_grad and parameter.grad is None] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_have_the_declared_strides_and_widths(family, image):
    backbone = build(family)
    maps = backbone.pyramid(image)
    assert [tuple(m.shape[1:]) for m in maps] == [
        (w, *(p // s for p, s in zip(CONFIG.patch_size, stride))) for w, stride in zip(backbone.widths, backbone.strides)
    ]
    assert backbone.pooled(image).shape == (2, backbone.widths[-1])


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_dense_features_are_the_deepest_map_with_cells_of_at_most_eight_voxels(family, image):
    backbone = build(family)
    assert max(backbone.dense_stride) <= 8 and torch.equal(backbone.dense(image), backbone.pyramid(image)[feature_level(backbone)])
    assert feature_level(backbone) == len(backbone.strides) - 1 or max(backbone.strides[feature_level(backbone) + 1]) > 8
    assert (backbone.dense_stride, backbone.dense_width) == (backbone.strides[feature_level(backbone)], backbone.widths[feature_level(backbone)])


def test_dense_features_of_a_segformer_are_all_maps_side_by_side_in_the_resolution_of_the_finest(image):
    backbone = build("segformer3d")
    dense, maps = backbone.dense(image), backbone.pyramid(image)
    assert len(maps) > 1 and dense.shape == (2, backbone.dense_width, *(n // step for n, step in zip(CONFIG.patch_size, backbone.dense_stride)))
    for level, part in zip(maps, dense.split(backbone.widths, 1)):
        edges = [a // b for a, b in zip(dense.shape[2:], level.shape[2:])]
        for axis, edge in enumerate(edges):  # linear between centres of cells, the same beyond those of the first and the last
            places = ((torch.arange(level.shape[2 + axis] * edge) + 0.5) / edge - 0.5).clamp(0, level.shape[2 + axis] - 1)
            low = places.floor().long()
            high, share = (low + 1).clamp(max=level.shape[2 + axis] - 1), (places - low).view(-1, *(1,) * (2 - axis))
            level = level.index_select(2 + axis, low) * (1 - share) + level.index_select(2 + axis, high) * share
        assert torch.allclose(part, level, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_tokens_equal_the_librarys_encoder(channels):
    backbone, image = build("primus", channels), torch.randn(2, channels, *CONFIG.patch_size)
    reference, _ = backbone.net.eva(backbone.net.down_projection(image).flatten(2).transpose(1, 2))
    assert torch.allclose(backbone.tokens(image), reference, atol=2e-5)


def test_keeping_every_token_equals_keeping_none_out(image):
    backbone = build("primus")
    every = torch.arange(backbone.tokens(image).shape[1]).expand(2, -1)
    assert torch.allclose(backbone.tokens(image, every), backbone.tokens(image), atol=2e-5)


def test_dropped_tokens_have_no_influence(image):
    backbone = build("primus")
    keep = torch.tensor([[0, 5, 9], [3, 8, 40]])
    before = backbone.tokens(image, keep)
    changed = image.clone()
    changed[0, :, 8:16, 8:16, 8:16] = 99.0  # token (1, 1, 1) = 21 of the first sample, kept by neither
    assert torch.equal(backbone.tokens(changed, keep), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_adaptation_keys_point_at_real_tensors(family):
    backbone = build(family)
    weights, keys = backbone.network_weights(), backbone.adaptation()
    assert any(key.startswith(keys.encoder + ".") for key in weights)
    assert any(key.startswith(keys.stem + ".") for key in weights)
    assert all(weights[f"{key}.weight"].shape[1] == 1 for key in keys.in_proj)
    assert keys.positions is None or sum(key == keys.positions for key in weights) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_that_is_not_divisible_is_refused(family):
    import dataclasses

    with pytest.raises(UserError, match="not divisible"):
        build(family, config=dataclasses.replace(CONFIG, patch_size=(33, 32, 32)))


def test_unknown_families_are_refused_with_the_closest_name():
    with pytest.raises(UserError, match="did you mean 'resenc'"):
        build("resnec")


def test_a_method_that_needs_more_than_a_family_offers_is_refused():
    with pytest.raises(UserError, match="ToyTrainer needs sparse; primus offers any_size, mask_token, pyramid, token_drop, volume"):
        check_support(families()["primus"], [frozenset({"sparse"})], "ToyTrainer")
    check_support(families()["resenc"], [frozenset({"sparse"}), frozenset({"decoder"})], "ToyTrainer")
