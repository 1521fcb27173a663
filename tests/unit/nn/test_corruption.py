"""Swapping voxels with another sample of the batch, and turning every sample by its own number."""

import numpy as np
import pytest
import torch

from nnssl_ext.nn.corruption import partners, swap, turn


@pytest.mark.parametrize(("count", "expected"), [(2, [1, 0]), (3, [1, 0, 1]), (4, [1, 0, 3, 2]), (5, [1, 0, 3, 2, 3])])
def test_a_partner_is_another_sample_of_the_batch(count, expected):
    assert partners(count) == expected


def test_halves_of_a_batch_have_the_partners_of_the_whole():
    assert partners(8) == partners(4) + [4 + number for number in partners(4)]


def test_hidden_voxels_are_the_partners_clean_ones_and_all_others_stay():
    torch.manual_seed(0)
    image, clean, hidden = torch.randn(3, 2, 4, 5, 6), torch.randn(3, 2, 4, 5, 6), torch.rand(3, 4, 5, 6) < 0.3
    found, other = swap(image, hidden, clean), [1, 0, 1]
    for b, c, z, y, x in np.ndindex(*image.shape):
        expected = clean[other[b], c, z, y, x] if hidden[b, z, y, x] else image[b, c, z, y, x]
        assert found[b, c, z, y, x] == expected
    image[hidden[:, None].expand_as(image)] = torch.nan
    assert torch.equal(swap(image, hidden, clean), found)


@pytest.mark.parametrize("plane", [(1, 2), (0, 2), (0, 1)])
def test_every_image_is_turned_by_its_own_number_as_numpy_does(plane):
    images, times = torch.randn(4, 2, 6, 6, 6), torch.tensor([3, 0, 1, 2])
    for image, number, found in zip(images, times, turn(images, times, plane)):
        assert np.array_equal(np.rot90(image.numpy(), int(number), (plane[0] + 1, plane[1] + 1)), found.numpy())
