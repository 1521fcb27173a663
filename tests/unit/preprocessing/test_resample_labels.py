"""Resampled labels equal nnU-Net's."""

import numpy as np
import pytest
from scipy import ndimage

from nnssl_ext.preprocessing.resample_labels import resample_labels


def label_map(rng, shape, labels):
    """Blobs of random labels and some single voxels, so that up to eight labels meet."""
    noise = [ndimage.gaussian_filter(rng.normal(size=shape), 2, mode="nearest") for _ in labels]
    found = np.asarray(labels)[np.argmax(noise, axis=0)]
    single = rng.random(shape) < 0.02
    found[single] = rng.choice(labels, int(single.sum()))
    return found


def random_cases(count):
    rng = np.random.default_rng(2)
    for case in range(count):
        spacing, target = rng.uniform(0.5, 2, 3), rng.uniform(0.5, 2, 3)
        if case % 3 == 1:
            spacing[rng.integers(3)] *= 5
        if case % 3 == 2:
            target[rng.integers(3)] *= 5
        yield rng.integers(2, 40, 3), rng.integers(2, 40, 3), spacing, target, int(rng.integers(10**6))


def expected_of_nnunet(labels, shape, spacing, target):
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    return resample_data_or_seg_to_shape(labels[None], shape, spacing, target, is_seg=True, order=1, order_z=0, force_separate_z=None)[0]


@pytest.mark.nnunet
@pytest.mark.parametrize(("shape", "new", "spacing", "target", "seed"), list(random_cases(30)))
def test_the_labels_equal_nnunets(shape, new, spacing, target, seed):
    rng = np.random.default_rng(seed)
    labels = label_map(rng, shape, [0, 1, 2, 5, 9, 200]).astype(np.int16)
    found = resample_labels(labels, new, spacing, target)
    assert found.dtype == labels.dtype
    assert np.array_equal(found, expected_of_nnunet(labels, new, spacing, target))


@pytest.mark.nnunet
@pytest.mark.parametrize("new", [(10, 10, 10), (40, 40, 40), (30, 10, 40), (60, 60, 60), (15, 5, 20), (21, 19, 20), (20, 20, 40)])
def test_ties_of_whole_numbered_factors_are_settled_as_in_nnunet(new):
    labels = np.random.default_rng(3).integers(0, 4, (20, 20, 20)).astype(np.uint8)
    assert np.array_equal(resample_labels(labels, new, (1, 1, 1), (1, 1, 1)), expected_of_nnunet(labels, new, (1, 1, 1), (1, 1, 1)))


@pytest.mark.nnunet
@pytest.mark.parametrize("seed", range(40))
def test_ties_in_tiny_maps_are_settled_as_in_nnunet(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, rng.integers(1, 5, 3)).astype(np.uint8)
    new, spacing = tuple(labels.shape * rng.choice([1, 2, 3, 5], 3)), rng.permutation([1, 1, 1 + 4 * (seed % 2)])
    assert np.array_equal(resample_labels(labels, new, spacing, (1, 1, 1)), expected_of_nnunet(labels, new, spacing, (1, 1, 1)))


@pytest.mark.nnunet
def test_negative_labels_and_masks_keep_their_type():
    labels = np.random.default_rng(4).integers(-1, 2, (9, 12, 11)).astype(np.int8)
    assert np.array_equal(resample_labels(labels, (7, 15, 20), (1, 1, 1), (1, 1, 1)), expected_of_nnunet(labels, (7, 15, 20), (1, 1, 1), (1, 1, 1)))
    assert resample_labels(labels > 0, (7, 15, 20), (1, 1, 1), (1, 1, 1)).dtype == bool


def test_no_label_appears_that_was_not_there_and_a_constant_map_stays_constant():
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[:4] = 2
    assert set(np.unique(resample_labels(labels, (13, 9, 5), (1, 1, 1), (1, 1, 1)))) == {0, 2}
    assert (resample_labels(np.full((5, 6, 7), 3), (9, 2, 11), (1, 1, 1), (1, 1, 1)) == 3).all()


def test_the_same_shape_returns_the_map_itself():
    labels = np.zeros((3, 4, 5), np.uint8)
    assert resample_labels(labels, (3, 4, 5), (1, 1, 1), (1, 1, 1)) is labels
