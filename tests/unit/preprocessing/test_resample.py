"""Resampling equals nnU-Net's default."""

import tracemalloc

import numpy as np
import pytest
from scipy import ndimage
from threadpoolctl import threadpool_limits

from nnssl_ext.preprocessing.resample import axis_matrix, resample, separate_axis


def random_pairs(count):
    rng = np.random.default_rng(1)
    for _ in range(count):
        spacing = rng.uniform(0.5, 2, 3)
        target = rng.uniform(0.5, 2, 3)
        if rng.random() < 0.4:
            spacing[rng.integers(3)] *= 5
        yield rng.integers(2, 90, 3), rng.integers(2, 90, 3), spacing, target, rng.integers(10**6)


@pytest.mark.nnunet
@pytest.mark.parametrize(("shape", "new", "spacing", "target", "seed"), list(random_pairs(30)))
def test_the_result_equals_nnunets_default_resampling(shape, new, spacing, target, seed):
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    data = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32) * 500
    expected = resample_data_or_seg_to_shape(data, new, spacing, target, is_seg=False, order=3, order_z=0, force_separate_z=None)
    found = resample(data, new, spacing, target)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    assert np.abs(found - expected).max() <= 1e-5 * np.ptp(data)


@pytest.mark.nnunet
@pytest.mark.parametrize(("old", "new"), [(1, 4), (4, 1), (12, 6), (6, 12), (9, 3), (7, 5), (5, 7), (24, 8)])
def test_a_coarse_axis_takes_the_nearest_slice_as_nnunet_does(old, new):
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    data = np.random.default_rng(0).normal(size=(1, old, 6, 7)).astype(np.float32)
    spacing, target = (8, 1, 1), (8 * old / new, 1, 1)
    expected = resample_data_or_seg_to_shape(data, (new, 9, 4), spacing, target, is_seg=False, order=3, order_z=0, force_separate_z=None)
    assert np.abs(resample(data, (new, 9, 4), spacing, target) - expected).max() <= 1e-5 * np.ptp(data)


def test_the_bits_do_not_depend_on_the_number_of_threads():
    data = np.random.default_rng(0).normal(size=(1, 97, 141, 133)).astype(np.float32)
    results = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            results.append(resample(data, (130, 111, 150), (1, 1, 1), (1, 1, 1)))
    assert np.array_equal(*results)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize(("old", "new"), [(1, 4), (2, 9), (7, 20), (20, 7), (33, 33), (100, 133), (150, 60)])
def test_a_matrix_equals_scipys_zoom_of_unit_vectors(order, old, new):
    zoomed = [ndimage.zoom(unit, new / old, order=order, mode="nearest", grid_mode=True) for unit in np.eye(old)]
    assert np.abs(axis_matrix(old, new, order) - np.stack(zoomed, axis=1)).max() < 1e-13


@pytest.mark.parametrize(("shape", "new", "spacing", "most"), [
    ((60, 90, 100), (80, 110, 120), (1, 1, 1), 8.5),
    ((80, 110, 120), (60, 90, 100), (1, 1, 1), 8.5),
    ((40, 110, 120), (70, 90, 100), (4, 1, 1), 8.5),
    ((110, 40, 120), (90, 70, 100), (1, 4, 1), 12.5),
])  # fmt: skip
def test_peak_memory_per_voxel_is_bounded(shape, new, spacing, most):
    data = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    resample(data[:1], new, spacing, (1, 1, 1))
    tracemalloc.start()
    resample(data[:1], new, spacing, (1, 1, 1))
    one = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    resample(data, new, spacing, (1, 1, 1))
    three = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    larger, result = max(np.prod(shape), np.prod(new)), 4 * np.prod(new)
    assert one <= most * larger  # array not counted, result counted
    assert three <= one + 2.1 * result  # channel after channel


def test_the_same_shape_returns_the_array_itself():
    data = np.ones((1, 3, 4, 5), np.float32)
    assert resample(data, (3, 4, 5), (1, 1, 1), (1, 1, 1)) is data


def test_a_coarse_axis_is_found_in_the_old_spacing_then_in_the_new_one():
    assert separate_axis((5, 1, 1), (1, 1, 1)) == 0
    assert separate_axis((1, 1, 1), (1, 1, 4)) == 2
    assert separate_axis((1, 1, 1), (2, 2, 2)) is None
    assert separate_axis((1, 5, 5), (1, 1, 1)) is None  # two coarse axes


def test_rows_of_a_matrix_sum_to_one_and_constant_volumes_stay_constant():
    for old, new in [(5, 9), (9, 5), (2, 7), (1, 4), (30, 31)]:
        assert np.allclose(axis_matrix(old, new, 3).sum(1), 1, atol=1e-6)
    constant = np.full((1, 6, 7, 8), 4.25, np.float32)
    assert np.all(resample(constant, (9, 5, 11), (1, 1, 1), (1, 1, 1)) == 4.25)


def test_values_never_leave_the_range_of_the_input():
    data = (np.random.default_rng(0).random((1, 12, 13, 14)) > 0.5).astype(np.float32)
    resampled = resample(data, (20, 20, 20), (1, 1, 1), (1, 1, 1))
    assert resampled.min() == 0 and resampled.max() == 1
