"""The networks that nnU-Net plans name."""

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus, PrimusV2
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper

from nnssl_ext.finetuning.decoders import width_at
from nnssl_ext.finetuning.networks import (
    FULL_RESOLUTION_STRIDES,
    AdapterPrimus,
    AdapterPrimusV2,
    FrozenResidualEncoderUNet,
    LinearPrimus,
    LinearPrimusV2,
    LinearResidualEncoderUNet,
    LinearSegFormer3D,
    MLPPrimus,
    MLPPrimusV2,
    MLPResidualEncoderUNet,
    PlannedPrimus,
    PlannedPrimusV2,
    PlannedSegFormer3D,
)
from nnssl_ext.nn.segformer3d import SegFormer3D

KWARGS = {"embed_dim": 48, "eva_depth": 1, "eva_numheads": 2, "patch_embed_size": (8, 8, 8), "input_shape": (16, 16, 16)}
pytestmark = pytest.mark.nnunet


STAGES = {"features_per_stage": [8, 16], "n_blocks_per_stage": [1, 1], "decoder_width": 12}
STRIDES = [[4, 4, 4], [2, 2, 2]]
PLANNED = [(PlannedPrimus, KWARGS), (PlannedPrimusV2, KWARGS), (PlannedSegFormer3D, {**STAGES, "encoder_strides": STRIDES})]


@pytest.mark.parametrize(
    ("planned", "library"),
    [(PlannedPrimus, (Primus, KWARGS)), (PlannedPrimusV2, (PrimusV2, KWARGS)), (PlannedSegFormer3D, (SegFormer3D, {**STAGES, "strides": STRIDES}))],
)
def test_the_state_dict_has_the_names_and_shapes_of_the_pretrained_network(planned, library):
    cls, kwargs = library
    own, expected = planned(2, 3, **dict(PLANNED)[planned]).state_dict(), cls(input_channels=2, num_classes=3, **kwargs).state_dict()
    assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in expected.items()}


@pytest.mark.parametrize(("planned", "kwargs"), [*PLANNED, (AdapterPrimus, KWARGS), (MLPPrimus, KWARGS)])
def test_deep_supervision_gives_one_output_for_every_scale_that_nnunet_derives(planned, kwargs):
    scales = list(1 / np.cumprod(np.vstack(FULL_RESOLUTION_STRIDES), axis=0))[:-1]
    network = planned(1, 2, deep_supervision=True, **kwargs).eval()
    image = torch.randn(1, 1, 16, 16, 16)
    outputs = network(image)
    assert len(outputs) == len(scales) and all(output.shape == (1, 2, 16, 16, 16) for output in outputs)
    network.decoder.deep_supervision = False
    assert torch.equal(network(image), outputs[0])


def test_the_loss_of_nnunet_is_finite_with_these_scales():
    weights = np.array([1 / 2**i for i in range(len(FULL_RESOLUTION_STRIDES) - 1)])
    weights[-1] = 0  # as nnUNetTrainer._build_loss does; with one scale the sum below is 0
    loss = DeepSupervisionWrapper(torch.nn.MSELoss(), weights / weights.sum())
    output = PlannedPrimus(1, 2, deep_supervision=True, **KWARGS)(torch.randn(1, 1, 16, 16, 16))
    assert torch.isfinite(loss(output, [torch.zeros_like(o) for o in output]))


def unet(axes):
    """Keyword arguments of a residual-encoder U-Net of two stages."""
    ops = {2: (torch.nn.Conv2d, torch.nn.InstanceNorm2d), 3: (torch.nn.Conv3d, torch.nn.InstanceNorm3d)}[axes]
    kwargs = {"n_stages": 2, "features_per_stage": [4, 6], "conv_op": ops[0], "kernel_sizes": [3, 3], "n_blocks_per_stage": [1, 1]}
    kwargs |= {"n_conv_per_stage_decoder": [1], "conv_bias": True, "norm_op": ops[1], "norm_op_kwargs": {"affine": True}, "nonlin": torch.nn.LeakyReLU}
    return kwargs, [[1] * axes, [2] * axes]


@pytest.mark.parametrize("axes", [2, 3])
def test_a_linear_probe_of_a_pyramid_is_the_sum_of_its_upsampled_levels(axes):
    kwargs, strides = unet(axes)
    network = LinearResidualEncoderUNet(1, 3, encoder_strides=strides, frozen=["encoder.stem", "encoder.stages"], **kwargs).eval()
    image = torch.randn(2, 1, *(8,) * axes)
    fine, coarse = network.encoder(image)
    expected = torch.einsum("bc...,kc->bk...", fine, network.linear[0].weight.flatten(1)) + network.linear[0].bias.view(-1, *(1,) * axes)
    low = torch.einsum("bc...,kc->bk...", coarse, network.linear[1].weight.flatten(1))
    expected = expected + torch.nn.functional.interpolate(low, scale_factor=2, mode={2: "bilinear", 3: "trilinear"}[axes])
    torch.testing.assert_close(network(image), expected)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 3 * (4 + 6 + 1)
    assert not any(key.startswith("decoder.") for key in network.state_dict())


def test_a_linear_probe_of_a_segformer_reads_its_encoder_alone():
    network = LinearSegFormer3D(1, 3, encoder_strides=STRIDES, frozen=["encoder.stem", "encoder.stages"], **STAGES).eval()
    image = torch.randn(1, 1, 16, 24, 8)
    fine, coarse = network.encoder(image)
    expected = [torch.nn.functional.interpolate(layer(level), (16, 24, 8), mode="trilinear") for layer, level in zip(network.linear, (fine, coarse))]
    torch.testing.assert_close(network(image), expected[0] + expected[1])
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 3 * (8 + 16 + 1)
    assert not any(key.startswith("decoder.") for key in network.state_dict())


@pytest.mark.parametrize("linear", [LinearPrimus, LinearPrimusV2])
def test_a_linear_probe_of_tokens_maps_each_by_itself(linear):
    network = linear(1, 2, frozen=["eva", "down_projection"], **KWARGS).eval()
    tokens = torch.randn(1, 48, 2, 2, 2)
    logits = network.up_projection(tokens)
    assert logits.shape == (1, 2, 16, 16, 16)
    weight, bias = (dict(network.up_projection.named_parameters())[f"0.{name}"] for name in ("weight", "bias"))
    for z, y, x in np.ndindex(2, 2, 2):  # voxels of the corners lie beyond the outermost tokens' centres
        corner = logits[0, :, 15 * z, 15 * y, 15 * x]
        torch.testing.assert_close(corner, weight.flatten(1) @ tokens[0, :, z, y, x] + bias)
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {"up_projection.0.weight", "up_projection.0.bias"}
    assert network(torch.randn(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)


def test_a_frozen_encoder_stays_in_evaluation_mode_and_its_decoder_does_not():
    kwargs, strides = unet(3)
    network = FrozenResidualEncoderUNet(1, 2, strides=strides, frozen=["encoder.stem", "encoder.stages"], **kwargs).train()
    assert not any(module.training for module in (*network.encoder.stem.modules(), *network.encoder.stages.modules()))
    assert network.decoder.stages.training and not network.eval().decoder.stages.training
    sum(output.sum() for output in network(torch.randn(1, 1, 8, 8, 8)).unsqueeze(0)).backward()
    assert all((parameter.grad is None) == name.startswith("encoder.") for name, parameter in network.named_parameters())


def test_a_single_parameter_can_be_frozen_and_nothing_is_by_default():
    register = PlannedPrimus(1, 2, frozen=["register_tokens"], num_register_tokens=2, **KWARGS)
    assert [name for name, p in register.named_parameters() if not p.requires_grad] == ["register_tokens"]
    assert all(p.requires_grad for p in PlannedPrimus(1, 2, **KWARGS).parameters())


def test_stochastic_depth_drops_nothing_in_a_frozen_encoder():
    network = PlannedPrimus(1, 2, frozen=["eva", "down_projection"], drop_path_rate=0.9, **{**KWARGS, "eva_depth": 4}).train()
    image = torch.randn(1, 1, 16, 16, 16)
    assert torch.equal(network(image), network(image))
    whole = PlannedPrimus(1, 2, drop_path_rate=0.9, **{**KWARGS, "eva_depth": 4}).train()
    assert any(not torch.equal(whole(image), whole(image)) for _ in range(5))


DECODED = [AdapterPrimus, AdapterPrimusV2, MLPPrimus, MLPPrimusV2, MLPResidualEncoderUNet]


def decoded(cls, shape, **changes):
    """A network with a decoder of ours, and the names that are frozen in it."""
    torch.manual_seed(0)
    if cls is MLPResidualEncoderUNet:
        kwargs, strides = unet(len(shape))
        return cls(1, 3, encoder_strides=strides, frozen=["encoder.stem", "encoder.stages"], **kwargs), "encoder."
    frozen = ["eva", "down_projection", "register_tokens"]
    kwargs = {**KWARGS, "input_shape": shape, "eva_depth": 2, "num_register_tokens": 2, **changes}
    return cls(1, 3, frozen=frozen, **kwargs), tuple(frozen)


@pytest.mark.parametrize("cls", [AdapterPrimus, MLPPrimus, MLPResidualEncoderUNet])
def test_a_decoder_gives_logits_of_a_patch_of_three_different_edges(cls):
    with torch.no_grad():
        assert decoded(cls, (64, 96, 32))[0](torch.randn(1, 1, 64, 96, 32)).shape == (1, 3, 64, 96, 32)


@pytest.mark.parametrize("cls", DECODED)
def test_a_decoder_gives_logits_of_every_voxel_and_learns_in_all_its_parts(cls):
    shape = (16, 24, 8)
    network, frozen = decoded(cls, shape)
    logits = network.train()(torch.randn(1, 1, *shape))
    assert logits.shape == (1, 3, *shape)
    (logits * torch.randn(logits.shape)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name
    assert not any(key.startswith(("up_projection.", "decoder.encoder.")) for key in network.state_dict())


@pytest.mark.parametrize("cls", DECODED)
def test_a_decoder_of_ours_has_as_many_weights_as_its_layers(cls):
    network, frozen = decoded(cls, (16, 16, 16))
    trained, width = sum(p.numel() for p in network.parameters() if p.requires_grad), 2 * KWARGS["embed_dim"]
    layers = {  # per layer: weights, biases; per norm: twice its channels
        "Adapter": width * 256 + 3 * 256 + sum(8 * c * c // 2 + 3 * (c // 2) for c in (256, 128, 64)) + 3 * (32 + 1),
        "MLPPrimus": width * 256 + 2 * 256 + 2 * 256 * 256 + 3 * 256 + 3 * (256 + 1),
        "MLPRes": (4 + 6 + 2) * 32 + 2 * 32 * 32 + 3 * 32 + 3 * (32 + 1),
    }
    assert [trained] == [count for start, count in layers.items() if cls.__name__.startswith(start)]


@pytest.mark.parametrize(("blocks", "depths"), [(1, [1]), (2, [1, 2]), (5, [2, 3, 4, 5]), (12, [3, 6, 9, 12])])
def test_a_decoder_of_tokens_reads_four_depths_where_there_are_so_many(blocks, depths):
    assert decoded(MLPPrimus, (16, 16, 16), eva_depth=blocks)[0].depths == depths


@pytest.mark.parametrize(("cls", "library"), [(AdapterPrimus, Primus), (MLPPrimusV2, PrimusV2)])
def test_the_deepest_map_is_what_the_library_decodes_and_the_others_are_those_of_shorter_networks(cls, library):
    shape, kwargs = (16, 32, 24), {**KWARGS, "num_register_tokens": 2, "input_shape": (16, 32, 24), "drop_path_rate": 0.2}
    network, _ = decoded(cls, shape, drop_path_rate=0.2)
    image, seen = torch.randn(2, 1, *shape), []
    with torch.no_grad():
        maps = network.train().maps(image)
        for depth in network.depths:
            shorter = library(1, num_classes=3, **{**kwargs, "eva_depth": depth}).eval()
            shorter.load_state_dict({key: value for key, value in network.state_dict().items() if key in shorter.state_dict()}, strict=False)
            shorter.up_projection = torch.nn.Identity()
            seen.append(shorter(image))
    assert len(maps) == 2 and all(torch.equal(one, other) for one, other in zip(maps, seen, strict=True))


def test_a_map_is_as_wide_as_in_a_unet():
    assert [width_at(cell) for cell in ((1, 1, 1), (2, 2, 2), (4, 4), (1, 4, 4), (8, 8, 8), (16, 8, 8))] == [32, 64, 128, 128, 256, 256]
