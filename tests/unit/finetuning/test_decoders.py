"""The decoders of frozen features against plain loops."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from nnssl_ext.finetuning.decoders import AllMLP, UpsamplingAdapter

pytestmark = pytest.mark.nnunet


def randomised(decoder):
    """With every parameter random, norms too, in double precision."""
    for parameter in decoder.parameters():
        parameter.data.normal_(0, 0.3)
    return decoder.double()


def normed(vector, norm):
    centred = vector - vector.mean()
    return centred / torch.sqrt(centred.square().mean() + 1e-6) * norm.weight + norm.bias


@pytest.mark.parametrize("cell", [(8, 8, 8), (2, 8, 4), (1, 2, 2)], ids=str)
def test_a_voxel_of_the_adapter_is_a_chain_of_layers_on_its_own_token(cell):
    torch.manual_seed(0)
    adapter, grid = randomised(UpsamplingAdapter([3, 5], cell, 2)), (2, 1, 2)
    maps = [torch.randn(1, width, *grid, dtype=torch.float64) for width in (3, 5)]
    features = adapter(maps)
    assert features.shape == (1, 32, *(n * edge for n, edge in zip(grid, cell)))
    for voxel in product(*(range(0, n * edge, max(1, edge - 1)) for n, edge in zip(grid, cell))):
        z, y, x = (place // edge for place, edge in zip(voxel, cell))
        (projection, norm, _), *doublings = adapter.layers
        vector = projection.weight.flatten(1) @ torch.cat([m[0, :, z, y, x] for m in maps]) + projection.bias
        vector = F.gelu(normed(vector, norm))
        left, edges = [place % edge for place, edge in zip(voxel, cell)], list(cell)
        for up, norm, _ in doublings:
            edges = [edge // step for edge, step in zip(edges, up.stride)]
            tap = tuple(place // edge for place, edge in zip(left, edges))
            left = [place % edge for place, edge in zip(left, edges)]
            vector = F.gelu(normed(vector @ up.weight[(slice(None), slice(None), *tap)] + up.bias, norm))
        assert edges == [1, 1, 1]
        torch.testing.assert_close(features[(0, slice(None), *voxel)], vector)


@pytest.mark.parametrize("cell", [(8, 8, 8), (2, 8, 4), (1, 2, 2)], ids=str)
def test_the_adapter_makes_cubes_of_its_cells_first(cell):
    edges = list(cell)
    for up, *_ in UpsamplingAdapter([4], cell, 2).layers[1:]:
        assert up.kernel_size == up.stride and all(step == 1 or edge == max(edges) for edge, step in zip(edges, up.stride))
        edges = [edge // step for edge, step in zip(edges, up.stride)]
    assert edges == [1, 1, 1]


@pytest.mark.parametrize("axes", [2, 3])
def test_the_mlp_decoder_fuses_the_concatenation_of_its_interpolated_levels(axes):
    torch.manual_seed(0)
    decoder = randomised(AllMLP([4, 6, 8], (2,) * axes, 3))
    maps = [torch.randn(2, width, *shape[:axes], dtype=torch.float64) for width, shape in ((4, (8, 4, 12)), (6, (4, 2, 6)), (8, (2, 1, 3)))]
    mode = {2: "bilinear", 3: "trilinear"}[axes]
    levels = []
    for stage, level in zip(decoder.stages, maps):
        narrowed = torch.einsum("bc...,kc->bk...", level, stage.weight) + stage.bias.view(-1, *(1,) * axes)
        levels.append(F.interpolate(narrowed, maps[0].shape[2:], mode=mode))
    fused = torch.einsum("bc...,kc->b...k", torch.cat(levels, 1), decoder.fuse.weight) + decoder.fuse.bias
    expected = F.relu(F.layer_norm(fused, (64,), decoder.norm.weight, decoder.norm.bias)).movedim(-1, 1)
    torch.testing.assert_close(decoder(maps), expected)
    assert decoder.seg_layers[0](expected).shape == (2, 3, *maps[0].shape[2:])
