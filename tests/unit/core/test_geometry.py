import json

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from nnssl_ext.core.geometry import Geometry, resampled_shape

DIRECTION = tuple(np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, -1.0]]).ravel())
GEOMETRY = Geometry((10, 20, 30), (3.0, 1.5, 0.7), (-5.0, 12.0, 7.5), DIRECTION)


def test_world_coordinates_are_those_of_simpleitk():
    image = sitk.Image(30, 20, 10, sitk.sitkUInt8)
    image.SetSpacing(GEOMETRY.spacing[::-1])
    image.SetOrigin(GEOMETRY.origin)
    image.SetDirection(DIRECTION)
    for z, y, x in ((0, 0, 0), (9, 19, 29), (2.25, 7.5, 11.125)):
        assert GEOMETRY.to_world((z, y, x)) == pytest.approx(image.TransformContinuousIndexToPhysicalPoint((x, y, z)), abs=1e-9)


def test_a_crop_shows_the_same_point_of_the_world():
    box = ((2, 8), (0, 20), (5, 6))
    crop = GEOMETRY.cropped(box)
    assert crop.shape == (6, 20, 1)
    assert crop.to_world((1, 2, 0)) == pytest.approx(GEOMETRY.to_world((3, 2, 5)), abs=1e-12)


def test_a_crop_may_reach_beyond_the_volume():
    assert GEOMETRY.cropped(((-2, 12), (0, 20), (0, 30))).to_world((2, 0, 0)) == pytest.approx(GEOMETRY.origin)


def test_crops_compose():
    twice = GEOMETRY.cropped(((2, 9), (3, 18), (4, 28))).cropped(((1, 5), (2, 6), (3, 7)))
    once = GEOMETRY.cropped(((3, 7), (5, 9), (7, 11)))
    assert twice.shape == once.shape
    assert twice.origin == pytest.approx(once.origin, abs=1e-12)


@given(st.tuples(*[st.integers(1, 60)] * 3))
def test_resampling_keeps_the_outer_faces_in_place(shape):
    new = GEOMETRY.resampled(shape)
    assert new.shape == shape
    for corner in np.ndindex(2, 2, 2):
        face = [c * n - 0.5 for c, n in zip(corner, shape)]
        old_face = [c * n - 0.5 for c, n in zip(corner, GEOMETRY.shape)]
        assert new.to_world(face) == pytest.approx(GEOMETRY.to_world(old_face), abs=1e-9)


def test_resampling_to_the_same_shape_changes_nothing():
    same = GEOMETRY.resampled(GEOMETRY.shape)
    assert same.spacing == pytest.approx(GEOMETRY.spacing)
    assert same.origin == pytest.approx(GEOMETRY.origin)


def test_a_geometry_comes_back_equal_from_json():
    assert Geometry.from_dict(json.loads(json.dumps(GEOMETRY.as_dict()))) == GEOMETRY


def test_an_unknown_position_is_the_identity():
    assert Geometry((1, 1, 1), (1.0, 1.0, 1.0)).to_world((1, 2, 3)).tolist() == [3, 2, 1]


@pytest.mark.parametrize(
    ("shape", "spacing", "target", "expected"),
    [
        ((10, 20, 30), (3, 1.5, 0.7), (3, 1.5, 0.7), (10, 20, 30)),
        ((10, 20, 30), (2, 1, 1), (1, 1, 2), (20, 20, 15)),
        ((1, 1, 1), (1, 1, 1), (50, 50, 50), (1, 1, 1)),
        ((5, 7, 3), (1, 1, 1), (2, 2, 2), (2, 4, 2)),
    ],
)
def test_the_resampled_shape_is_rounded_and_never_empty(shape, spacing, target, expected):
    assert resampled_shape(shape, spacing, target) == expected
