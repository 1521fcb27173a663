"""From two volumes to a displacement: what is compared, in which order it is moved, and what learns."""

import pytest
import torch

from nnssl_ext.nn.backbones.base import build_backbone
from nnssl_ext.nn.matching import AffineHead, FlowHead, MatchingUNet
from nnssl_ext.nn.warp import affine_displacement, affine_matrix, compose, warp
from tests.make_data import tiny_plan

PATCH = (8, 24, 16)


def network(channels=1):
    torch.manual_seed(0)
    backbone = build_backbone(tiny_plan(channels, PATCH).configuration("3d_fullres"), "resenc", channels)
    backbone.train_decoder(True)
    return MatchingUNet(backbone, (3.0, 1.0, 1.0))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5)])
def test_heads_say_nearly_nothing_before_they_are_trained_and_take_the_volumes_in_order(shape):
    maps = torch.randn(2, 2, 6, *shape)
    for head, found in ((AffineHead(6), (2, 12)), (FlowHead(6), (2, 3, *shape))):
        with torch.no_grad():
            there, back = head(*maps), head(*maps.flip(0))
        assert there.shape == found and float(there.abs().max()) < 1e-2 and not torch.equal(there, back)


def test_the_moving_volume_is_moved_by_the_affine_map_and_then_by_the_flow():
    model, (fixed, moving) = network(), torch.randn(2, 2, 1, *PATCH)
    parameters, seen = 0.3 * torch.randn(2, 12), []
    model.affine.register_forward_hook(lambda module, inputs, output: parameters)
    model.flow.register_forward_hook(lambda module, inputs, output: seen.append(inputs) or torch.full_like(output, 0.5))
    with torch.no_grad():
        _, flow, displacement = model(fixed, moving)
        features = model.backbone.decode(model.backbone.pyramid(torch.cat((fixed, moving))))
    affine = affine_displacement(affine_matrix(parameters, PATCH, (3.0, 1.0, 1.0)), PATCH)
    torch.testing.assert_close(displacement, compose(flow, affine))
    torch.testing.assert_close(seen[0][0], features[:2])
    torch.testing.assert_close(seen[0][1], warp(features[2:], affine))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_restored_volume_depends_on_the_fixed_one_alone_and_the_displacement_on_both(channels):
    model, (fixed, moving) = network(channels).eval(), torch.randn(2, 1, channels, *PATCH)
    with torch.no_grad():
        restored, _, displacement = model(fixed, moving)
        again, _, other = model(fixed, -moving)
    assert restored.shape == fixed.shape and displacement.shape == (1, 3, *PATCH)
    torch.testing.assert_close(restored, again)
    assert not torch.equal(displacement, other)
