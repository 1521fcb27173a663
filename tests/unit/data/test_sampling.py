"""Where crops are taken."""

import itertools

import numpy as np
import pytest

from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data import sampling
from nnssl_ext.data.sampling import body_share, iou, random_box, whole


def share_by_voxels(body: np.ndarray, shape, box) -> float:
    """The same by an array of voxels."""
    voxels = np.zeros([8 * n for n in body.shape], bool)
    voxels[:] = body.repeat(8, 0).repeat(8, 1).repeat(8, 2)
    inside = voxels[tuple(slice(max(0, low), max(0, high)) for low, high in box)]
    return inside.sum() / np.prod([high - low for low, high in box])


def blob(shape, share=0.3, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).random([-(-n // 8) for n in shape]) < share


def valid_starts(body, shape, size, minimum):
    ranges = [range(n - s + 1) for n, s in zip(shape, size)]
    return {
        (z, y, x)
        for z in ranges[0]
        for y in ranges[1]
        for x in ranges[2]
        if share_by_voxels(body, shape, tuple((a, a + s) for a, s in zip((z, y, x), size))) >= minimum
    }


def test_positions_are_uniform_over_all_valid_starts():
    counts = np.zeros(7, int)
    for i in range(7000):
        ((low, high), *_) = random_box(whole((10, 4, 4)), (4, 4, 4), sample_rng(0, i))
        assert high - low == 4
        counts[low] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 22.5  # chi-square, 6 degrees of freedom, p = .001


def test_the_share_of_body_equals_counting_voxels():
    shape, body = (40, 33, 50), blob((40, 33, 50))
    for i in range(200):
        rng = sample_rng(1, i)
        size = rng.integers(1, 30, 3)
        box = tuple((int(a), int(a + s)) for a, s in zip(rng.integers(-20, 45, 3), size))
        assert body_share(body, box) == pytest.approx(share_by_voxels(body, shape, box))


def test_positions_are_uniform_over_those_with_enough_body():
    shape, size, minimum = (26, 12, 20), (9, 11, 12), 0.3
    body = blob(shape, 0.3, 4)
    valid = valid_starts(body, shape, size, minimum)
    assert 0.2 * 324 < len(valid) < 0.6 * 324
    assert_uniform(valid, lambda rng: random_box(whole(shape), size, rng, body, minimum))


def test_rare_positions_are_uniform_over_every_eighth_voxel_with_enough_body():
    shape, size = (64, 64, 60), (12, 16, 12)
    body = np.zeros((8, 8, 8), bool)
    body[1:3, 4:7, 2:4] = body[5, 5, 5] = True
    starts = [(z, y, x) for z in [*range(0, 52, 8), 52] for y in range(0, 49, 8) for x in range(0, 49, 8)]
    valid = {start for start in starts if share_by_voxels(body, shape, tuple((a, a + s) for a, s in zip(start, size))) >= 0.6}
    assert len(valid) == 6
    assert_uniform(valid, lambda rng: sampling._search((0, 0, 0), (53, 49, 49), size, rng, body, 0.6))


def assert_uniform(valid, draw) -> None:
    counts = dict.fromkeys(valid, 0)
    for i in range(60 * len(valid)):
        counts[tuple(low for low, _ in draw(sample_rng(2, i)))] += 1  # KeyError: not a valid one
    chi_square, freedom = sum((n - 60) ** 2 / 60 for n in counts.values()), len(valid) - 1
    assert chi_square - freedom < 4 * np.sqrt(2 * freedom)


def test_a_rare_place_with_enough_body_is_found():
    body = np.zeros((30, 30, 30), bool)
    body[20:22, 3:5, 11:13] = True
    for i in range(20):
        box = random_box(whole((240, 240, 240)), (16, 16, 16), sample_rng(0, i), body, 0.9)
        assert body_share(body, box) >= 0.9


def test_without_a_place_that_holds_enough_the_best_one_is_taken():
    body = np.zeros((5, 5, 5), bool)
    body[2, 2, 2] = True
    for i in range(20):
        box = random_box(whole((40, 40, 37)), (16, 12, 10), sample_rng(0, i), body, 0.9)
        assert all(low <= 16 and high >= 24 for low, high in box)


def test_a_case_without_body_and_a_case_smaller_than_the_crop_give_a_box():
    assert random_box(whole((20, 20, 20)), (8, 8, 8), sample_rng(0, 0), np.zeros((3, 3, 3), bool), 0.25)
    assert random_box(whole((5, 20, 6)), (16, 20, 16), sample_rng(0, 0), np.ones((1, 3, 1), bool), 0.9) == ((-6, 10), (0, 20), (-5, 11))


def test_a_box_stays_inside_the_box_around_it():
    for i in range(100):
        box = random_box(((5, 25), (-3, 17), (8, 40)), (10, 20, 11), sample_rng(0, i), np.ones((6, 6, 6), bool), 0.9)
        assert box[1] == (-3, 17) and 5 <= box[0][0] <= 15 and 8 <= box[2][0] <= 29


def test_the_overlap_of_boxes_is_that_of_their_voxels():
    rng = np.random.default_rng(0)
    apart = 0
    for _ in range(300):
        lows = rng.integers(-4, 6, (2, 3))
        boxes = [tuple((low, low + size) for low, size in zip(start.tolist(), rng.integers(1, 8, 3).tolist())) for start in lows]
        first, second = ({*itertools.product(*(range(*side) for side in box))} for box in boxes)
        assert iou(*boxes) == len(first & second) / len(first | second)
        apart += not first & second
    assert 30 < apart < 270
