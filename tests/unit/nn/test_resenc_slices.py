"""A 2D U-Net as a backbone of volumes."""

import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn.backbones.base import backbone_class, build_backbone, families
from nnssl_ext.nn.backbones.resenc_slices import ResEncSlicesBackbone
from tests.make_data import slice_plan


def build(axis=0, channels=1):
    torch.manual_seed(0)
    return build_backbone(slice_plan(channels, axis).configuration("2d"), "resenc", channels).eval()


def volume(axis, slices=3, channels=1):
    """Slices of 16 x 16 pixels across an axis, each as (B, C, 16, 16) and all of them as (B, C, z, y, x)."""
    every = [torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(n)) for n in range(slices)]
    return every, torch.stack(every, axis + 2)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_maps_and_decoded_features_are_those_of_the_librarys_network_slice_by_slice(axis, channels):
    backbone = build(axis, channels)
    every, x = volume(axis, channels=channels)
    with torch.no_grad():
        maps, alone = backbone.pyramid(x), [backbone.net.encoder(one) for one in every]
        for level, found in enumerate(maps):
            assert torch.allclose(found, torch.stack([one[level] for one in alone], axis + 2), atol=1e-5)
            expected = [1 if other == axis else 16 // backbone.strides[level][other] for other in range(3)]
            assert [n for other, n in enumerate(found.shape[2:]) if other != axis] == [n for other, n in enumerate(expected) if other != axis]
            assert found.shape[1] == backbone.widths[level] and found.shape[axis + 2] == 3
        decoded = backbone.decode(maps)
        assert decoded.shape == (2, backbone.widths[0], *x.shape[2:])
        for number, one in enumerate(every):
            logits = backbone.net.decoder.seg_layers[-1](decoded.select(axis + 2, number))
            assert torch.allclose(logits, backbone.net(one), atol=1e-5)


def test_a_slice_has_no_influence_on_another_one():
    backbone, (_, x) = build(), volume(0)
    changed = x.clone()
    changed[:, :, 1] += 1
    with torch.no_grad():
        for before, after in zip(backbone.pyramid(x), backbone.pyramid(changed)):
            assert torch.equal(before[:, :, [0, 2]], after[:, :, [0, 2]]) and not torch.equal(before[:, :, 1], after[:, :, 1])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_are_one_across_slices(axis):
    backbone = build(axis)
    assert backbone.strides == tuple(tuple(1 if other == axis else 2**level for other in range(3)) for level in range(3))
    assert backbone.pooled(volume(axis)[1]).shape == (2, backbone.widths[-1])


def test_it_is_the_familys_class_for_networks_of_two_axes():
    config = slice_plan().configuration("2d")
    assert backbone_class(config, "resenc") is ResEncSlicesBackbone and families(2) == {"resenc": ResEncSlicesBackbone}
    assert "volume" not in ResEncSlicesBackbone.supports and all("volume" in cls.supports for cls in families().values())


@pytest.mark.parametrize("patch", [(16, 16, 16), (1, 1, 16)])
def test_a_patch_must_be_one_slice(patch):
    network = slice_plan().configuration("2d").networks["resenc"]
    with pytest.raises(UserError, match="is no slice"):
        ResEncSlicesBackbone(1, patch, network.class_name, dict(network.kwargs), network.imports)


def test_a_slice_that_the_strides_do_not_divide_is_refused():
    network = slice_plan().configuration("2d").networks["resenc"]
    with pytest.raises(UserError, match="patch size 1x18x16 is not divisible by the total stride 1x4x4"):
        ResEncSlicesBackbone(1, (1, 18, 16), network.class_name, dict(network.kwargs), network.imports)
