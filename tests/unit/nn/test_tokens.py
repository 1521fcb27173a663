"""Tokens, voxels and positions."""

from itertools import product

import pytest
import torch
from torch import nn

from nnssl_ext.nn.tokens import block_moments, gather, patchify, resize_positions, split_tokens, unpatchify, voxel_mask


def test_patchify_and_unpatchify_are_inverse_on_non_cubic_grids():
    x = torch.randn(2, 3, 4, 12, 16)
    assert torch.equal(unpatchify(patchify(x, (2, 4, 4)), (2, 3, 4), (2, 4, 4)), x)


def test_the_token_order_is_that_of_a_strided_convolution():
    x, conv = torch.randn(2, 2, 8, 24, 16, dtype=torch.float64), nn.Conv3d(2, 5, (4, 8, 8), (4, 8, 8)).double()
    linear = torch.nn.functional.linear(patchify(x, (4, 8, 8)), conv.weight.flatten(1), conv.bias)
    assert torch.allclose(linear, conv(x).flatten(2).transpose(1, 2), atol=1e-12)


def test_token_ids_round_trip_through_the_grid():
    ids = torch.arange(24).reshape(1, 1, 2, 3, 4).double()  # grid (2, 3, 4): id = (z * 3 + y) * 4 + x
    volume = ids.repeat_interleave(4, 2).repeat_interleave(2, 3).repeat_interleave(8, 4)
    assert torch.equal(patchify(volume, (4, 2, 8))[0, :, 0], torch.arange(24).double())
    assert bool((patchify(volume, (4, 2, 8))[0] == torch.arange(24)[:, None]).all())


def test_splitting_keeps_ascending_order_and_counts():
    hidden = torch.tensor([[True, False, True, False], [False, False, True, True]])
    visible, masked = split_tokens(hidden)
    assert visible.tolist() == [[1, 3], [0, 1]] and masked.tolist() == [[0, 2], [2, 3]]
    rows = torch.arange(8.0).reshape(2, 4, 1)
    assert gather(rows, visible)[..., 0].tolist() == [[1, 3], [4, 5]]


def test_resized_positions_of_a_linear_ramp_stay_linear():
    z, y, x = torch.meshgrid(*(torch.arange(n).double() for n in (4, 6, 8)), indexing="ij")
    positions = torch.stack((z, y, x), -1).reshape(1, -1, 3)
    resized = resize_positions(positions, (4, 6, 8), (8, 6, 4)).reshape(8, 6, 4, 3)
    assert torch.allclose(resized[2:-2, 0, 0, 0], (torch.arange(8) + 0.5)[2:-2].double() / 2 - 0.5)  # half-voxel centres
    assert torch.allclose(resized[0, :, 0, 1], torch.arange(6).double())
    assert torch.allclose(resized[0, 0, :, 2], (torch.arange(4) + 0.5).double() * 2 - 0.5)


def test_positions_of_the_same_grid_are_returned_unchanged():
    positions = torch.randn(1, 24, 5)
    assert resize_positions(positions, (2, 3, 4), (2, 3, 4)) is positions


@pytest.mark.parametrize("number", range(24))
def test_a_token_of_a_2x3x4_grid_hides_its_own_voxels_and_no_others(number):
    """Also where depth and width would be exchanged: no voxel of another token is among them."""
    z, y, x = number // 12, number // 4 % 3, number % 4
    mask = torch.zeros(1, 24, dtype=torch.bool)
    mask[0, number] = True
    expected = torch.zeros(1, 1, 4, 12, 32, dtype=torch.bool)
    expected[:, :, 2 * z : 2 * z + 2, 4 * y : 4 * y + 4, 8 * x : 8 * x + 8] = True
    hidden = voxel_mask(mask.reshape(1, 2, 3, 4), (4, 12, 32))
    assert torch.equal(hidden, expected) and torch.equal(patchify(hidden, (2, 4, 8)).all(2), mask)
    exchanged = voxel_mask(mask.reshape(1, 4, 3, 2).transpose(1, 3), (4, 12, 32))  # the order (x y z)
    assert torch.equal(exchanged, expected) == (number in (0, 23))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("shape", "grid"), [((4, 6, 8), (2, 3, 4)), ((5, 7, 3), (3, 2, 1)), ((6, 6, 6), (1, 1, 1))])
def test_moments_of_blocks_equal_plain_loops_also_where_the_last_block_is_cut(shape, grid, channels):
    image = torch.randn(2, channels, *shape, dtype=torch.float64) + 5
    mean, deviation = block_moments(image, grid)
    edges = [-(-size // cells) for size, cells in zip(shape, grid)]
    for b, c, *place in product(range(2), range(channels), *map(range, shape)):
        block = tuple(slice(p // e * e, p // e * e + e) for p, e in zip(place, edges))
        values = image[(b, c, *block)].flatten().tolist()
        middle = sum(values) / len(values)
        variance = sum((value - middle) ** 2 for value in values) / len(values)
        assert mean[(b, c, *place)].item() == pytest.approx(middle, rel=1e-9)
        assert deviation[(b, c, *place)].item() == pytest.approx((variance + 1e-6) ** 0.5, rel=1e-9)


def test_a_constant_block_is_normalised_to_zeros_up_to_its_rounding():
    for value in (-3.7, 1024.3):
        image = torch.full((1, 1, 48, 48, 48), value)
        mean, deviation = block_moments(image, (3, 3, 3))
        assert bool((((image - mean) / deviation).abs() < 0.01).all())


def test_moments_of_half_precision_are_in_single_precision():
    image = torch.full((1, 1, 4, 4, 4), 300.0, dtype=torch.float16)
    image[..., 0] = 100.0
    mean, deviation = block_moments(image, (1, 1, 1))
    assert mean.dtype == torch.float32 and mean.max().item() == 250.0 and deviation.max().item() == pytest.approx(7500**0.5)
