"""The U-Net without skips: sizes of its scales, what reaches a restoration, and what is normalised together."""

import pytest
import torch

from nnssl_ext.nn.backbones.base import build_backbone
from nnssl_ext.nn.skipless import Comparison, SkiplessDecoder, SkiplessUNet
from tests.make_data import tiny_plan


def network(channels=1, patch=(16, 16, 16), family="resenc"):
    torch.manual_seed(0)
    plan = tiny_plan(channels, patch)
    return SkiplessUNet(build_backbone(plan.configuration("3d_fullres"), family, channels))


def test_each_scale_has_the_size_and_the_width_of_a_level_of_the_encoder():
    class Levels:
        strides, widths = ((1, 1, 1), (1, 2, 2), (2, 4, 4)), (4, 6, 8)

    maps = SkiplessDecoder(Levels())(torch.randn(2, 8, 3, 2, 5))
    assert [tuple(feature.shape) for feature in maps] == [(2, 6, 6, 4, 10), (2, 4, 6, 8, 20)]


def test_a_finest_map_that_is_coarser_than_the_image_is_followed_by_a_scale_of_full_resolution():
    model, image = network(2, (8, 24, 16), "segformer3d"), torch.randn(2, 2, 8, 24, 16)
    assert [tuple(feature.shape) for feature in model.maps(image)] == [(2, 8, 4, 12, 8), (2, 8, 8, 24, 16)]
    _, images = model(torch.stack((image, image)), torch.randn(1, 2, 2, 8, 8, 8))
    assert [tuple(restored.shape) for restored in images] == [(2, 2, 4, 12, 8), (2, 2, 8, 24, 16), (2, 2, 8, 24, 16)]


def test_everything_that_is_restored_went_through_the_deepest_map():
    model = network()
    image = torch.randn(2, 1, 16, 16, 16)
    levels = model.backbone.pyramid(image)
    model.backbone.pyramid = lambda x: [torch.randn_like(level) for level in levels[:-1]] + [levels[-1]]
    first, again = model.maps(image), model.maps(image)
    assert all(torch.equal(one, other) for one, other in zip(first, again))
    model.backbone.pyramid = lambda x: levels[:-1] + [levels[-1].flip(0)]
    assert all(torch.allclose(one, other.flip(0), atol=1e-5) for one, other in zip(first, model.maps(image)))


@pytest.mark.parametrize("channels", [1, 3])
def test_vectors_of_all_crops_and_the_first_one_in_every_resolution(channels):
    model = network(channels, (8, 24, 16))
    vectors, images = model(torch.randn(2, 3, channels, 8, 24, 16), torch.randn(5, 3, channels, 8, 8, 8))
    assert [tuple(v.shape) for v in vectors] == [(2, 7, 3, 16), (2, 7, 3, 8)]
    assert [tuple(image.shape) for image in images] == [(3, channels, 4, 12, 8), (3, channels, 8, 24, 16), (3, channels, 8, 24, 16)]


def test_large_crops_are_normalised_each_among_its_own_kind_and_small_ones_together():
    vectors, _ = network().train()(torch.randn(2, 4, 1, 16, 16, 16), torch.randn(3, 4, 1, 8, 8, 8))
    for z, _ in vectors:
        for kind in (z[0], z[1], z[2:].flatten(0, 1)):
            assert kind.mean(0).abs().max() < 1e-4
        assert z[2].mean(0).abs().max() > 1e-2


def test_a_projection_is_the_normalised_average_of_a_map_and_a_prediction_its_perceptron():
    compare, feature = Comparison(3).train(), torch.randn(4, 3, 2, 2, 2)
    average = feature.mean((2, 3, 4))
    z, p = compare(feature)
    torch.testing.assert_close(z, (average - average.mean(0)) / (average.var(0, correction=0) + 1e-5).sqrt())
    torch.testing.assert_close(p, compare.predictor(z))
