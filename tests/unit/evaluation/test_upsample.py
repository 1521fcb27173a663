"""Values of cells at voxels: against PyTorch's interpolation, plain loops, and images with edges."""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnssl_ext.evaluation.upsample import Upsampler

CELL = (4, 2, 3)


def dense(upsampler, maps):
    return upsampler(maps, torch.arange(math.prod(upsampler.shape))).reshape(len(maps), *upsampler.shape)


def test_without_a_guide_it_is_trilinear_interpolation():
    maps = torch.rand(5, 3, 4, 6)
    expected = F.interpolate(maps[None], scale_factor=CELL, mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(dense(Upsampler((12, 8, 18), CELL), maps), expected)
    cut = dense(Upsampler((10, 7, 16), CELL), maps)  # the last cells reach beyond the volume
    torch.testing.assert_close(cut, expected[:, :10, :7, :16])


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("shape", [(8, 4, 6), (7, 5, 8), (3, 1, 4)])
def test_with_a_guide_it_is_a_plain_loop_over_the_eight_cells_around_a_voxel(shape, channels):
    image = np.random.default_rng(0).normal(size=(channels, *shape)).astype(np.float32)
    cells = [-(-n // edge) for n, edge in zip(shape, CELL)]
    maps = torch.rand(2, *cells, dtype=torch.float64)
    inside = {q: tuple(slice(k * edge, (k + 1) * edge) for k, edge in zip(q, CELL)) for q in product(*map(range, cells))}
    means = {q: image[(slice(None), *box)].mean((1, 2, 3)) for q, box in inside.items()}
    spread = sum(((image[(slice(None), *box)] - means[q][:, None, None, None]) ** 2).sum((1, 2, 3)) for q, box in inside.items()) / image[0].size
    found = dense(Upsampler(shape, CELL, image), maps)
    for p in product(*map(range, shape)):
        total, summed = 0.0, torch.zeros(2, dtype=torch.float64)
        for q in inside:
            near = math.prod(max(0.0, 1 - abs(min(max((i + 0.5) / edge - 0.5, 0), n - 1) - k)) for i, edge, n, k in zip(p, CELL, cells, q))
            weight = near * math.exp(-sum((image[(c, *p)] - means[q][c]) ** 2 / (2 * spread[c]) for c in range(channels) if spread[c] > 0))
            total, summed = total + weight, summed + weight * maps[(slice(None), *q)]
        torch.testing.assert_close(found[(slice(None), *p)], summed / total, rtol=1e-4, atol=1e-5)


def test_weights_sum_to_one_and_a_constant_map_stays_constant_whatever_the_image():
    image = np.random.default_rng(0).normal(scale=1e4, size=(1, 9, 9, 9)).astype(np.float32)
    image[0, 0] = 1e7
    upsampler = Upsampler((9, 9, 9), CELL, image)
    weights = upsampler.weights(torch.arange(729))[1]
    torch.testing.assert_close(weights.sum(0), torch.ones(729))
    torch.testing.assert_close(dense(upsampler, torch.full((1, 3, 5, 3), 7.0)), torch.full((1, 9, 9, 9), 7.0))


def test_an_image_without_edges_guides_nobody():
    maps = torch.rand(3, 2, 4, 3)
    plain, guided = (dense(Upsampler((8, 8, 9), CELL, guide), maps) for guide in (None, np.full((1, 8, 8, 9), 5.0, np.float32)))
    torch.testing.assert_close(plain, guided)


def test_a_guide_sharpens_the_border_of_a_structure():
    truth = np.zeros((16, 16, 16), np.float32)
    truth[:, :, 7:] = 1  # within a cell
    image = truth[None] + np.random.default_rng(0).normal(scale=0.05, size=(1, 16, 16, 16)).astype(np.float32)
    maps = F.avg_pool3d(torch.from_numpy(truth)[None], 4)
    errors = [(dense(Upsampler((16, 16, 16), (4, 4, 4), guide), maps)[0].numpy() - truth)[:, :, 5:9] for guide in (None, image)]
    assert np.abs(errors[1]).mean() < 0.6 * np.abs(errors[0]).mean()
