"""Volumes on other grids, against SimpleITK."""

import numpy as np
import pytest
import SimpleITK
import torch

from nnssl_ext.core.geometry import Geometry
from nnssl_ext.evaluation.placement import place, to_index

COSINE, SINE = np.cos(0.3), np.sin(0.3)
OBLIQUE = (COSINE, -SINE, 0.0, SINE, COSINE, 0.0, 0.0, 0.0, -1.0)
FROM = Geometry((12, 14, 10), (3.0, 2.0, 2.5), (10.0, -20.0, 30.0), OBLIQUE)
ONTO = Geometry((9, 8, 11), (2.0, 2.5, 1.5), (2.0, -8.0, 24.0))


def itk(array, geometry, vectors=False):
    image = SimpleITK.GetImageFromArray(array, isVector=vectors)
    image.SetSpacing(geometry.spacing[::-1])
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    return image


@pytest.mark.parametrize("mode, interpolator", [("bilinear", SimpleITK.sitkLinear), ("nearest", SimpleITK.sitkNearestNeighbor)])
def test_values_at_another_oblique_grid_are_those_of_simpleitk(mode, interpolator):
    array = np.random.default_rng(0).standard_normal(FROM.shape)
    expected = SimpleITK.Resample(itk(array, FROM), itk(np.zeros(ONTO.shape), ONTO), SimpleITK.Transform(), interpolator, -99.0)
    expected = SimpleITK.GetArrayFromImage(expected)
    found = place(torch.from_numpy(array)[None], FROM, ONTO, mode=mode)[0].numpy()
    known = expected != -99
    assert 0.2 < known.mean() < 1
    np.testing.assert_allclose(found[known], expected[known], atol=1e-6)


def test_nothing_is_done_on_the_same_grid_and_what_lies_outside_is_zero_where_asked():
    values = torch.randn(2, *FROM.shape)
    assert place(values, FROM, FROM) is values
    ones = torch.ones(1, *FROM.shape)
    assert set(place(ones, FROM, ONTO, mode="nearest", padding="zeros").unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(place(ones, FROM, ONTO), torch.ones(1, *ONTO.shape))


def test_a_displacement_is_in_voxels_of_the_new_grid():
    values = torch.randn(1, *FROM.shape)
    displacement = torch.tensor([1.0, -2.0, 3.0]).view(3, 1, 1, 1).expand(3, *FROM.shape)
    torch.testing.assert_close(place(values, FROM, FROM, displacement)[:, :-1, 2:, :-3], values[:, 1:, :-2, 3:], atol=1e-5, rtol=0)


def test_world_points_become_voxels():
    index = np.array([[1.5, 2.0, 3.25], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(to_index(np.stack([FROM.to_world(place) for place in index]), FROM), index, atol=1e-9)
