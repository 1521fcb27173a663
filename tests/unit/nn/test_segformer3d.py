"""SegFormer3D: its layers against plain attention and plain loops, its shapes, its size."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnssl_ext.nn.segformer3d import Decoder, EfficientAttention, MixFFN, PatchEmbedding, SegFormer3D, cells, reductions, volume

SMALL = {
    "features_per_stage": (8, 16, 32, 64),
    "strides": ((4, 4, 4), (2, 2, 2), (2, 2, 2), (2, 2, 1)),
    "n_blocks_per_stage": (1, 1, 1, 2),
    "decoder_width": 12,
}
SHAPE = (2, 4, 6)  # of a map


def small(channels=1, classes=2, **changes):
    torch.manual_seed(0)
    return SegFormer3D(channels, classes, **{**SMALL, **changes})


def plain_attention(layer, width, heads):
    """PyTorch's multi-head attention with the weights of an efficient one."""
    plain = nn.MultiheadAttention(width, heads, batch_first=True).double()
    plain.in_proj_weight.data = torch.cat((layer.q.weight, layer.kv.weight)).data
    plain.in_proj_bias.data = torch.cat((layer.q.bias, layer.kv.bias)).data
    plain.out_proj.load_state_dict(layer.proj.state_dict())
    return plain


def test_without_a_reduction_attention_is_plain_attention():
    torch.manual_seed(0)
    layer, x = EfficientAttention(24, 3, (1, 1, 1)).double(), torch.randn(2, 48, 24, dtype=torch.float64)
    expected, _ = plain_attention(layer, 24, 3)(x, x, x)
    assert not any(isinstance(part, nn.Conv3d) for part in layer.modules())
    torch.testing.assert_close(layer(x, SHAPE), expected)


def test_with_a_reduction_keys_and_values_are_linear_maps_of_blocks_of_cells():
    torch.manual_seed(0)
    layer, x = EfficientAttention(12, 2, (1, 2, 3)).double(), torch.randn(2, 12, *SHAPE, dtype=torch.float64)
    keys = []
    for z, y, w in product(range(2), range(2), range(2)):  # row by row
        block = x[:, :, z : z + 1, 2 * y : 2 * y + 2, 3 * w : 3 * w + 3]
        keys.append(layer.norm((block[:, None] * layer.reduce.weight).sum((2, 3, 4, 5)) + layer.reduce.bias))
    keys = torch.stack(keys, 1)
    expected, _ = plain_attention(layer, 12, 2)(cells(x), keys, keys)
    torch.testing.assert_close(layer(cells(x), SHAPE), expected)


def test_the_feed_forward_layer_mixes_each_hidden_channel_over_neighbouring_cells():
    torch.manual_seed(0)
    layer, x = MixFFN(3, 5).double(), torch.randn(1, 48, 3, dtype=torch.float64)
    hidden = F.pad(volume(layer.fc1(x), SHAPE), (1,) * 6)[0]
    for number, (z, y, w) in enumerate(product(*map(range, SHAPE))):
        mixed = [(hidden[c, z : z + 3, y : y + 3, w : w + 3] * layer.depthwise.weight[c, 0]).sum() + layer.depthwise.bias[c] for c in range(5)]
        torch.testing.assert_close(layer(x, SHAPE)[0, number], layer.fc2(F.gelu(torch.stack(mixed))))


@pytest.mark.parametrize(("stride", "kernel"), [((4, 4, 4), (7, 7, 7)), ((2, 2, 2), (3, 3, 3)), ((1, 2, 4), (1, 3, 7))])
def test_patches_overlap_by_almost_half_of_their_width(stride, kernel):
    layer = PatchEmbedding(1, 6, stride)
    assert layer.projection.kernel_size == kernel and layer(torch.randn(2, 1, 8, 8, 12)).shape == (2, 6, *(n // s for n, s in zip((8, 8, 12), stride)))


def test_keys_and_values_of_all_fine_stages_lie_on_the_grid_of_the_third_one():
    published = [(4,) * 3, (2,) * 3, (2,) * 3, (2,) * 3]
    assert reductions(published) == [(4, 4, 4), (2, 2, 2), (1, 1, 1), (1, 1, 1)]
    assert reductions([(1, 4, 4), (1, 2, 2), (2, 2, 2)]) == [(2, 4, 4), (2, 2, 2), (1, 1, 1)]
    assert reductions([(4, 4, 4)]) == [(1, 1, 1)] and reductions(published[:2]) == [(2, 2, 2), (1, 1, 1)]


def test_the_decoder_is_one_linear_layer_over_all_levels_side_by_side():
    torch.manual_seed(0)
    decoder = Decoder((4, 6, 8), 10, 2).double()
    maps = [torch.randn(2, width, *(n // 2**level for n in (8, 4, 12)), dtype=torch.float64) for level, width in enumerate((4, 6, 8))]
    levels = [volume(stage(cells(level)), level.shape[2:]) for stage, level in zip(decoder.stages, maps)]
    together = torch.cat([F.interpolate(level, (8, 4, 12), mode="trilinear") for level in levels], 1)
    expected = decoder.norm(decoder.fuse(together.movedim(1, -1))).relu().movedim(-1, 1)
    torch.testing.assert_close(decoder(maps), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_patch_of_unequal_edges_gives_maps_by_its_strides_dense_features_of_a_quarter_and_logits_of_its_size(channels):
    network, image = small(channels, 5), torch.randn(1, channels, 64, 96, 32)
    with torch.no_grad():
        maps = network.encoder(image)
        assert [tuple(level.shape[1:]) for level in maps] == [(8, 16, 24, 8), (16, 8, 12, 4), (32, 4, 6, 2), (64, 2, 3, 2)]
        assert network.decoder(maps).shape == (1, 12, 16, 24, 8)
        assert network(image).shape == (1, 5, 64, 96, 32)


def test_every_parameter_gets_a_gradient():
    network = small()
    network(torch.randn(1, 1, 32, 64, 32)).square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


def test_the_published_size_has_four_and_a_half_million_parameters():
    sizes = {"features_per_stage": (32, 64, 160, 256), "strides": ((4,) * 3, (2,) * 3, (2,) * 3, (2,) * 3), "n_blocks_per_stage": (2,) * 4}
    with torch.device("meta"):
        network = SegFormer3D(4, 3, **sizes, decoder_width=256)  # BraTS: four channels, three classes
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_515_267  # the paper: 4.51 million


def test_the_same_image_in_another_frame_has_the_same_features_away_from_the_border():
    """No position is embedded: inside, a shift of the input by whole cells shifts an embedding."""
    network, image = small(), torch.randn(1, 1, 32, 32, 32)
    shifted = network.encoder.stem(image.roll(4, 2))
    torch.testing.assert_close(shifted[:, :, 2:7], network.encoder.stem(image)[:, :, 1:6])
