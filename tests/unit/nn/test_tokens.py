"""Tokens, voxels and positions."""

import torch
from torch import nn

from nnssl_ext.nn.tokens import gather, patchify, resize_positions, split_tokens, unpatchify


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
