"""Corruptions of a crop: what they change, and what they leave."""

from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest

from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data import corrupt
from nnssl_ext.data.corrupt import bend, bezier, bezier_curve, drop_holes, keep_holes, paint_in, paint_out, shuffle, value_range

EVERY = [bezier, drop_holes, keep_holes, paint_in, paint_out, shuffle]
SHAPES = [(16, 16, 16), (7, 20, 33), (1, 12, 5), (2, 3, 4), (1, 1, 1)]
THIRD = np.array([[1 / 3, 1 / 3], [2 / 3, 2 / 3]])  # with these the curve is the diagonal


def z_scored(shape, channels=3, number=0):
    """Channels of different means and widths, with a few voxels far out."""
    rng = sample_rng(0, number, "image")
    image = rng.standard_normal((channels, *shape), np.float32) * (1 + np.arange(channels, dtype=np.float32)[:, None, None, None]) - 2
    image[:, 0, 0, 0] += 20
    return image


def boxes_of(changed):
    """Edges of the smallest box around the changed voxels of (C, z, y, x)."""
    return [np.ptp(axis) + 1 for axis in changed.any(0).nonzero()]


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", EVERY, ids=lambda f: f.__name__)
def test_every_size_of_crop_can_be_corrupted_and_the_original_stays_as_it_is(function, shape, channels):
    image = z_scored(shape, channels)
    before = image.copy()
    for i in range(20):
        result, again = (function(image, sample_rng(1, i)) for _ in range(2))
        assert result.shape == image.shape and result.dtype == np.float32 and np.isfinite(result).all() and result.flags.c_contiguous
        assert np.array_equal(result, again) and not np.shares_memory(result, image)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("function", EVERY, ids=lambda f: f.__name__)
def test_every_channel_is_corrupted_and_a_constant_one_stays_finite(function):
    image = z_scored((16, 20, 24))
    changed = function(image, sample_rng(2, 3)) != image
    assert changed.any((1, 2, 3)).all()
    assert np.allclose(function(np.full((2, 12, 12, 12), -3, np.float32), sample_rng(2, 3)), -3, atol=1e-5)


@pytest.mark.parametrize("function", [drop_holes, keep_holes, paint_in, paint_out, shuffle], ids=lambda f: f.__name__)
def test_the_same_voxels_of_all_channels_are_replaced_or_moved(function):
    for i in range(10):
        image = z_scored((16, 20, 24), number=i)
        changed = function(image, sample_rng(3, i)) != image
        assert (changed == changed[:1]).mean() > 0.9999  # noise may equal a voxel by chance


def test_noise_lies_within_the_percentiles_of_each_channel():
    image = z_scored((24, 24, 24))
    low, high = value_range(image)
    for channel in range(3):
        assert np.allclose((low[channel], high[channel]), np.percentile(image[channel], (0.5, 99.5)), atol=1e-5)
    result = keep_holes(image, sample_rng(4, 0))
    noise = [values[values != original] for values, original in zip(result, image)]
    for values, a, b in zip(noise, low, high):
        assert a <= values.min() and values.max() <= b
        counts = np.histogram(values, 10, (a, b))[0] / len(values)
        assert np.abs(counts - 0.1).max() < 5 * (0.09 / len(values)) ** 0.5  # uniform


def test_the_range_of_a_large_crop_is_estimated_closely():
    image = z_scored((64, 64, 64), 2)
    low, high = value_range(image)
    for channel in range(2):
        ranks = [(image[channel] < limit).mean() for limit in (low[channel], high[channel])]
        assert ranks == pytest.approx([0.005, 0.995], abs=0.002)


def test_one_dropped_hole_is_a_box_with_edges_of_the_given_range_inside_the_crop():
    sizes = []
    for i in range(300):
        image = z_scored((40, 48, 52), 1)
        changed = drop_holes(image, sample_rng(5, i), holes=1, edges=(5, 12)) != image
        sizes.append(boxes_of(changed))
        assert changed.sum() == np.prod(sizes[-1])  # nothing but the box, and all of it
    assert np.array(sizes).min() == 5 and np.array(sizes).max() == 12
    assert (np.ptp(sizes, axis=1) > 0).mean() > 0.9  # each axis by itself


def test_one_kept_hole_is_the_original_and_all_else_is_noise():
    image = z_scored((40, 48, 52), 2)
    for i in range(30):
        kept = keep_holes(image, sample_rng(6, i), holes=1, edges=(10, 20)) == image
        size = [np.ptp(axis) + 1 for axis in kept.all(0).nonzero()]
        assert all(10 <= edge <= 20 for edge in size) and kept.all(0).sum() == np.prod(size)


@pytest.mark.parametrize("function", [drop_holes, keep_holes], ids=lambda f: f.__name__)
def test_boxes_are_at_most_two_thirds_of_the_crop_along_each_axis(function):
    for i in range(50):
        image = z_scored((16, 30, 1), 1)
        changed = function(image, sample_rng(7, i), holes=1) != image
        size = boxes_of(changed if function is drop_holes else ~changed)
        assert size[0] <= 10 and size[1] <= 20 and size[2] == 1
        assert changed.any() and not changed.all()


@pytest.mark.parametrize("shape", [(96, 96, 96), (30, 60, 90)], ids=str)
def test_painted_boxes_have_the_sizes_and_numbers_of_the_source(shape):
    image = np.zeros((1, *shape), np.float32)
    image[0, ::2] = 1  # so that noise never equals a voxel
    sizes = np.array(shape)
    for i in range(40):
        inner, outer = paint_in(image, sample_rng(8, i)) != image, paint_out(image, sample_rng(8, i)) == image
        assert np.prod(sizes // 6) <= inner.sum() <= 5 * np.prod(sizes // 3)
        assert np.prod(sizes * 3 // 7) <= outer.sum() <= 5 * np.prod(sizes * 4 // 7)


def test_each_further_box_is_painted_with_a_chance_of_nineteen_in_twenty_up_to_five(monkeypatch):
    drawn = []
    monkeypatch.setattr(corrupt, "drop_holes", lambda image, rng, holes, edges: drawn.append(holes))
    for i in range(4000):
        paint_in(np.zeros((1, 8, 8, 8), np.float32), sample_rng(9, i))
    expected = np.array([0] + [0.05 * 0.95**k for k in range(4)] + [0.95**4])
    assert np.abs(np.bincount(drawn, minlength=6) / 4000 - expected).max() < 0.03


def by_hand(image, starts, sizes, uniform):
    """Fisher's and Yates's shuffle by plain loops over plain lists."""
    result, used = image.copy(), 0
    for start, size in zip(starts.tolist(), sizes.tolist()):
        z, y, x = (slice(a, a + n) for a, n in zip(start, size))
        voxels = [
            result[(slice(None), *place)].copy()
            for place in np.ndindex(*result.shape[1:])
            if z.start <= place[0] < z.stop and y.start <= place[1] < y.stop and x.start <= place[2] < x.stop
        ]
        for i in range(len(voxels)):
            j = i + int(float(uniform[used]) * (len(voxels) - i))
            voxels[i], voxels[j], used = voxels[j], voxels[i], used + 1
        result[:, z, y, x] = np.array(voxels).T.reshape(len(image), *size)
    return result


@pytest.mark.parametrize("edges", [(4, 4), (1, 5), ((1, 2, 3), (3, 2, 6))], ids=str)
def test_shuffled_windows_equal_a_plain_shuffle_of_each_one_after_the_other(edges, monkeypatch):
    image, seen = z_scored((9, 8, 10)), {}
    original = corrupt._permute

    def spy(image, *arguments):
        seen["arguments"] = arguments
        original(image, *arguments)

    monkeypatch.setattr(corrupt, "_permute", spy)
    result = shuffle(image, sample_rng(10, 0), 12, edges)
    assert np.array_equal(result, by_hand(image, *seen["arguments"]))


def test_a_shuffled_window_keeps_its_voxels_and_all_outside_of_it_stays():
    for i in range(50):
        image = np.arange(2 * 12 * 14 * 16, dtype=np.float32).reshape(2, 12, 14, 16)
        result = shuffle(image, sample_rng(11, i), 1, (6, 6))
        changed = result != image
        window = tuple(slice(axis.min(), axis.max() + 1) for axis in changed[0].nonzero())
        assert all(s.stop - s.start <= 6 for s in window)
        assert np.array_equal(np.sort(result[(0, *window)].ravel()), np.sort(image[(0, *window)].ravel()))
        assert np.array_equal(result[1] - result[0], image[1] - image[0])  # a voxel's channels stay together
        assert changed[0].sum() > 150  # of 216


def test_every_permutation_of_a_window_at_every_place_is_equally_likely():
    image, found, expected = np.arange(5, dtype=np.float32).reshape(1, 1, 1, 5), Counter(), Counter()
    for i in range(9000):
        found[tuple(shuffle(image, sample_rng(12, i), 1, (3, 3)).ravel().tolist())] += 1 / 9000
    for place, order in product(range(3), permutations(range(3))):
        expected[(*range(place), *(place + k for k in order), *range(place + 3, 5))] += 1 / 18
    assert set(found) == set(expected) and max(abs(found[order] - share) for order, share in expected.items()) < 0.02


def curve_exactly(points, falling, x):
    """y of a Bezier curve at x, by bisection of its cubic."""
    low, high = 0.0, 1.0
    for _ in range(200):
        t = (low + high) / 2
        here = 3 * t * (1 - t) ** 2 * points[0][0] + 3 * t**2 * (1 - t) * points[1][0] + t**3
        low, high = (t, high) if here < x else (low, t)
    t = 1 - low if falling else low
    return 3 * t * (1 - t) ** 2 * points[0][1] + 3 * t**2 * (1 - t) * points[1][1] + t**3


def test_control_points_on_the_diagonal_change_nothing_and_falling_ones_invert():
    image = z_scored((8, 8, 8), 1)[0]
    low, high = np.percentile(image, (5, 95)).astype(np.float32)
    same, inverted = image.copy(), image.copy()
    bend(same, low, high, bezier_curve(THIRD, falling=False))
    bend(inverted, low, high, bezier_curve(THIRD, falling=True))
    assert np.abs(same - image).max() < 1e-5  # also of the voxels beyond the ends: nothing is clipped
    assert np.abs(inverted - (low + high - image)).max() < 1e-5  # 1 - x on [0, 1]


def test_curves_agree_with_the_cubic_equation():
    errors = []
    for i in range(300):
        rng = sample_rng(13, i)
        points, falling, x = rng.random((2, 2)), bool(i % 2), rng.random(8).astype(np.float32)
        found = x.copy().reshape(1, 2, 4)
        bend(found, 0.0, 1.0, bezier_curve(points, falling))
        errors.extend(abs(found.ravel() - [curve_exactly(points, falling, float(v)) for v in x]))
    assert np.mean(errors) < 2e-7 and np.max(errors) < 1e-4


@pytest.mark.parametrize("points", [[[0, 0], [1, 1]], [[0, 1], [0, 1]], [[1, 0], [1, 0]], [[1, 1], [0, 0]], [[1, 0], [0, 1]], [[0, 1], [1, 0]]], ids=str)
def test_a_curve_is_monotonic_from_corner_to_corner_wherever_its_points_lie(points):
    for falling in (False, True):
        curve = bezier_curve(np.array(points, float), falling)
        assert curve[[0, -1]].tolist() == ([1, 0] if falling else [0, 1])
        assert (np.diff(curve) * (-1 if falling else 1) >= 0).all()


def test_bezier_keeps_or_reverses_the_order_of_values_and_maps_the_range_onto_itself():
    rising = 0
    for i in range(200):
        image = z_scored((10, 10, 10), 2, number=i)
        low, high = value_range(image)
        result = bezier(image, sample_rng(14, i))
        for channel in range(2):
            ordered = np.diff(result[channel].ravel()[np.argsort(image[channel].ravel())])
            up, down = (ordered >= -1e-5).all(), (ordered <= 1e-5).all()
            assert up != down
            rising += up
            inside = (image[channel] >= low[channel]) & (image[channel] <= high[channel])
            assert low[channel] - 1e-4 <= result[channel][inside].min() and result[channel][inside].max() <= high[channel] + 1e-4
            beyond = ~inside
            assert len(np.unique(result[channel][beyond])) == beyond.sum()  # values far out are still told apart
    assert abs(rising / 400 - 0.5) < 4 * (0.25 / 400) ** 0.5
