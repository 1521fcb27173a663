"""Crops and their boxes."""

import numpy as np

from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.views import Crop, random_box, random_crop, read_box
from tests.make_data import ArrayStore


def test_crop_positions_are_uniform_over_all_valid_starts():
    counts = np.zeros(7, int)
    for i in range(7000):
        ((low, high), *_) = random_box((10, 4, 4), (4, 4, 4), sample_rng(0, i))
        assert high - low == 4
        counts[low] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 22.5  # chi-square, 6 degrees of freedom, p = .001


def test_an_axis_that_is_too_short_is_centred_and_padded_with_the_background():
    store = ArrayStore(1, shape=(5, 20, 20), channels=2)
    box = random_box(store.shape(0), (9, 8, 8), sample_rng(0, 0))
    assert box[0] == (-2, 7)
    crop = read_box(store, 0, box)
    assert crop.shape == (2, 9, 8, 8)
    inside = tuple(slice(low, high) for low, high in box[1:])
    assert np.array_equal(crop[:, 2:7], store.arrays[0][(slice(None), slice(None), *inside)])
    for channel in range(2):
        assert np.all(crop[channel, :2] == store.fill(0)[channel])
        assert np.all(crop[channel, 7:] == store.fill(0)[channel])


def test_the_record_of_a_view_reproduces_its_voxels():
    store = ArrayStore()
    for i in range(20):
        view = random_crop(store, 3, (16, 24, 12), sample_rng(1, i))
        again = read_box(store, 3, view.box)
        for axis in range(3):
            if view.flips[axis]:
                again = np.flip(again, axis + 1)
        assert np.array_equal(view.image, again)
        assert view.image.flags.c_contiguous


def test_each_axis_is_mirrored_half_of_the_time():
    store = ArrayStore(1, shape=(4, 4, 4))
    flips = np.array([Crop((4, 4, 4)).sample(store, 0, sample_rng(0, i))["image"].flips for i in range(2000)])
    assert np.abs(flips.mean(0) - 0.5).max() < 0.05
    assert np.abs(np.corrcoef(flips.T) - np.eye(3)).max() < 0.1
