"""Left and right of a case, whichever way its array lies in the world."""

from itertools import permutations, product

import numpy as np
import pytest

from nnssl_ext.core.geometry import Geometry
from nnssl_ext.data.sagittal import BodyFrames, body_frame, mirrored
from nnssl_ext.data.spatial import rotation_matrix, to_case, to_crop
from tests.make_data import ArrayStore

SHAPE, SPACING, ORIGIN = (16, 24, 40), (5.0, 0.8, 1.5), (-31.0, 12.5, 700.0)
OBLIQUE = tuple(rotation_matrix(np.array([20.0, -35.0, 50.0])).ravel())


def cells(seed=0):
    """Body cells of a case of SHAPE voxels that are on no axis alike on both sides."""
    return np.random.default_rng(seed).random((2, 3, 5)) < np.linspace(0.1, 1, 5)


def reoriented(geometry, body, order, flips):
    """The same volume with its array's axes permuted and turned round."""
    direction = np.array(geometry.direction).reshape(3, 3)[:, ::-1]  # columns in the order of the array
    first = [n - 1 if flip else 0 for n, flip in zip(geometry.shape, flips)]
    columns = np.stack([direction[:, axis] * (-1 if flips[axis] else 1) for axis in order], 1)
    turned = np.transpose(np.flip(body, [axis for axis in range(3) if flips[axis]]), order)
    shape, spacing = (tuple(values[axis] for axis in order) for values in (geometry.shape, geometry.spacing))
    return Geometry(shape, spacing, tuple(geometry.to_world(first)), tuple(columns[:, ::-1].ravel())), turned


@pytest.mark.parametrize("direction", [Geometry((1, 1, 1), (1, 1, 1)).direction, OBLIQUE], ids=["straight", "oblique"])
def test_all_48_orders_and_directions_of_the_axes_give_a_place_of_the_world_the_same_coordinates(direction):
    geometry, body = Geometry(SHAPE, SPACING, ORIGIN, direction), cells()
    voxels = np.random.default_rng(1).uniform(0, 1, (20, 3)) * SHAPE
    expected = to_case(body_frame(geometry, body), voxels)
    for order, flips in product(permutations(range(3)), product((False, True), repeat=3)):
        other, turned = reoriented(geometry, body, order, flips)
        there = np.where(flips, np.array(SHAPE) - 1 - voxels, voxels)[:, order]
        np.testing.assert_allclose([other.to_world(v) for v in there], [geometry.to_world(v) for v in voxels], atol=1e-9)
        np.testing.assert_allclose(to_case(body_frame(other, turned), there), expected, atol=1e-9)


def test_coordinates_are_mm_of_the_world_from_the_middle_of_the_body():
    geometry, body = Geometry(SHAPE, SPACING, ORIGIN, OBLIQUE), cells()
    inside = np.array([voxel for voxel in np.ndindex(SHAPE) if body[tuple(v // 8 for v in voxel)]])
    middle = np.mean([geometry.to_world(voxel) for voxel in inside], 0)
    for voxel in ((0, 0, 0), (3, 7.5, 22)):
        np.testing.assert_allclose(to_case(body_frame(geometry, body), np.array(voxel)), geometry.to_world(voxel) - middle, atol=1e-9)


def test_a_case_without_body_has_its_own_middle_and_a_cell_that_is_cut_off_counts_by_its_voxels():
    geometry = Geometry((20, 9, 30), SPACING, ORIGIN, OBLIQUE)
    for body in (np.zeros((3, 2, 4), bool), np.ones((3, 2, 4), bool)):
        np.testing.assert_allclose(to_case(body_frame(geometry, body), np.array((9.5, 4.0, 14.5))), 0, atol=1e-9)


def test_mirrored_twice_is_where_it_was_and_once_is_on_the_other_side_of_the_plane():
    frame = body_frame(Geometry(SHAPE, SPACING, ORIGIN, OBLIQUE), cells())
    voxels = np.random.default_rng(2).uniform(-5, 40, (30, 3))
    there = to_crop(frame, mirrored(to_case(frame, voxels)))
    again = to_crop(frame, mirrored(to_case(frame, there)))
    np.testing.assert_allclose(again, voxels, atol=1e-9)
    middle = to_case(frame, (voxels + there) / 2)
    np.testing.assert_allclose(middle[:, 0], 0, atol=1e-9)  # half-way lies the plane
    assert (np.linalg.norm(voxels - there, axis=1) > 1e-3).all()
    np.testing.assert_allclose(np.diff(to_case(frame, np.stack((voxels, there))), axis=0)[0, :, 1:], 0, atol=1e-9)  # and the way crosses it at a right angle


def test_the_frame_of_a_case_is_read_once_and_each_sample_gets_its_own():
    class Counting(ArrayStore):
        asked = []

        def geometry(self, case):
            self.asked.append(case)
            return Geometry(self.shape(case), (1.0 + case, 1.0, 1.0))

    frames = BodyFrames(Counting(3, (16, 16, 16)))
    found = [frames(cases).numpy() for cases in ((2, 0, 2), (0, 1), (2,))]
    assert sorted(Counting.asked) == [0, 1, 2]
    assert [frame[2, 0] for frame in found[0]] == [3, 1, 3] and np.array_equal(found[0][0], found[2][0]) and found[1].shape == (2, 3, 4)
