"""An image of the input's size from every backbone family."""

import dataclasses

import pytest
import torch
from torch import nn

from nnssl_ext.nn.backbones.base import build_backbone
from nnssl_ext.nn.pixel_head import Reconstruction
from tests.make_data import make_plan, tiny_plan

FAMILIES = ["resenc", "primus", "primus_v2", "segformer3d"]


def make(family: str, channels: int = 1, out_channels: int = 1, patch=(16, 24, 32)) -> Reconstruction:
    """Tiny networks; Primus V2 with the smallest tokens that it has."""
    torch.manual_seed(0)
    plan = tiny_plan(channels).configuration("3d_fullres")
    if family == "primus_v2":
        network = make_plan(channels=channels).configuration("3d_fullres").network(family)
        small = {"embed_dim": 48, "eva_depth": 1, "eva_numheads": 2}
        plan = dataclasses.replace(plan, networks={family: dataclasses.replace(network, kwargs={**network.kwargs, **small})})
    backbone = build_backbone(dataclasses.replace(plan, patch_size=patch), family, channels)
    backbone.train_decoder(True)
    return Reconstruction(backbone, out_channels).eval()


@pytest.mark.parametrize("channels, out_channels", [(1, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_has_the_size_of_the_input_and_the_wanted_channels(family, channels, out_channels):
    model, image = make(family, channels, out_channels), torch.randn(2, channels, 16, 24, 32)
    output = model(image)
    assert output.shape == (2, out_channels, 16, 24, 32)
    assert torch.equal(output, model.from_maps(model.backbone.pyramid(image)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_gets_a_gradient(family):
    model = make(family)
    model.train()
    model(torch.randn(2, 1, 16, 24, 32)).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None] == []


def test_a_transformers_cell_fills_its_own_voxels_channel_by_channel():
    model, channels = make("primus", out_channels=2), 48
    deepest = torch.randn(2, channels, 4, 6, 8)
    assert isinstance(model.head, nn.Linear)
    image = model.from_maps([deepest])
    for sample, c, z, y, x in [(0, 0, 0, 0, 0), (1, 1, 15, 23, 31), (0, 1, 5, 10, 2), (1, 0, 6, 3, 29)]:
        row = ((c * 4 + z % 4) * 4 + y % 4) * 4 + x % 4
        expected = model.head.weight[row] @ deepest[sample, :, z // 4, y // 4, x // 4] + model.head.bias[row]
        assert image[sample, c, z, y, x].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_unets_image_is_a_pointwise_layer_over_the_decoder():
    model, image = make("resenc", out_channels=3), torch.randn(1, 1, 16, 24, 32)
    features = model.backbone.decode(model.backbone.pyramid(image))
    expected = torch.einsum("oc,bczyx->bozyx", model.head.weight[:, :, 0, 0, 0], features) + model.head.bias[:, None, None, None]
    assert torch.allclose(model(image), expected, atol=1e-5)
