"""Surface distances against plain loops and shapes whose distances are known."""

import math

import numpy as np
import pytest

from nnssl_ext.evaluation.surface_distances import SurfaceDistances

SPACING = (3.0, 1.5, 2.0)


def cube(start, edge=8, shape=(24, 24, 24)):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(first, first + edge) for first in start)] = True
    return mask


def plain(first, second, spacing):
    """Distances by loops over voxels and faces."""

    def surface(mask):
        padded, found = np.pad(mask, 1), []
        for at in np.argwhere(padded):
            neighbours = [tuple(at + step * np.eye(3, dtype=int)[axis]) for axis in range(3) for step in (-1, 1)]
            if not all(padded[place] for place in neighbours):
                found.append((at - 1) * np.asarray(spacing))
        return np.array(found)

    a, b = surface(first), surface(second)
    away = np.linalg.norm(a[:, None] - b[None], axis=2)
    return away.min(1), away.min(0)


def test_distances_and_figures_equal_plain_loops():
    rng = np.random.default_rng(0)
    first, second = rng.random((6, 7, 5)) > 0.4, rng.random((6, 7, 5)) > 0.6
    forth, back = plain(first, second, SPACING)
    found = SurfaceDistances.between(first, second, SPACING)
    np.testing.assert_allclose(np.sort(found.forth), np.sort(forth))
    np.testing.assert_allclose(np.sort(found.back), np.sort(back))
    assert found.hd95() == pytest.approx(max(np.percentile(forth, 95), np.percentile(back, 95)))
    assert found.assd() == pytest.approx(np.concatenate([forth, back]).mean())
    assert found.nsd(2.0) == pytest.approx((np.concatenate([forth, back]) <= 2.0 + 1e-6).mean()) and 0 < found.nsd(2.0) < 1


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_hd95_of_shifted_cubes_is_the_shift_in_mm(axis, k):
    start = [6, 7, 5]
    moved = [first + k * (axis == other) for other, first in enumerate(start)]
    found = SurfaceDistances.between(cube(start), cube(moved), SPACING)
    assert found.hd95() == pytest.approx(k * SPACING[axis])
    assert found.nsd(k * SPACING[axis]) == 1.0 and found.nsd(0.9 * k * SPACING[axis]) < 1.0


def test_equal_masks_are_not_apart_and_the_order_of_the_two_does_not_matter():
    found = SurfaceDistances.between(cube((3, 3, 3)), cube((3, 3, 3)), SPACING)
    assert (found.hd95(), found.assd(), found.nsd(0.0)) == (0.0, 0.0, 1.0)
    one, other = SurfaceDistances.between(cube((3, 3, 3)), cube((5, 3, 4)), SPACING), SurfaceDistances.between(cube((5, 3, 4)), cube((3, 3, 3)), SPACING)
    assert (one.hd95(), one.assd(), one.nsd(2.0)) == pytest.approx((other.hd95(), other.assd(), other.nsd(2.0)))


def test_masks_apart_on_both_sides_of_the_volume_are_measured_across_it():
    first, second = np.zeros((2, 2, 30), bool), np.zeros((2, 2, 30), bool)
    first[0, 0, 0] = second[0, 0, 29] = True
    assert SurfaceDistances.between(first, second, (1.0, 1.0, 0.5)).hd95() == pytest.approx(14.5)


@pytest.mark.parametrize("empty", ["first", "second", "both"])
def test_an_empty_mask_has_no_distances(empty):
    first = cube((3, 3, 3)) & (empty == "second")
    second = cube((3, 3, 3)) & (empty == "first")
    found = SurfaceDistances.between(first, second, SPACING)
    assert all(math.isnan(value) for value in (found.hd95(), found.assd(), found.nsd(1.0)))
