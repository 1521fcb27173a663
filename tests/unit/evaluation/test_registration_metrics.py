"""Metrics of registrations against shapes and fields whose values are known."""

import math

import numpy as np
import pytest
import SimpleITK
import torch

from nnssl_ext.evaluation.registration_metrics import label_metrics, landmark_errors, regularity
from nnssl_ext.nn.warp import affine_displacement

SPACING = (3.0, 1.5, 0.8)


def cube(first, edge=8, shape=(24, 24, 24)):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(start, start + edge) for start in first)] = True
    return mask


def test_every_label_of_the_fixed_image_has_its_row():
    fixed = cube((2, 2, 2)) + 2 * cube((14, 14, 14)).astype(int)
    rows = label_metrics(fixed, np.where(fixed == 2, 0, fixed), SPACING)
    assert rows[1] == {"dice": 1.0, "hd95_mm": 0.0, "assd_mm": 0.0}
    assert rows[2]["dice"] == 0 and math.isnan(rows[2]["hd95_mm"]) and list(rows) == [1, 2]


def test_landmarks_have_no_error_through_the_true_field():
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*map(np.arange, (10, 12, 9)), indexing="ij")).astype(float)
    matrix = 0.1 * rng.standard_normal((3, 3))
    displacement = np.einsum("ij,jzyx->izyx", matrix, grid) + np.reshape((1.0, -0.5, 2.0), (3, 1, 1, 1))  # linear, as interpolation is
    fixed = rng.uniform(0, 8, (6, 3))
    moving = fixed + fixed @ matrix.T + (1.0, -0.5, 2.0)
    np.testing.assert_allclose(landmark_errors(fixed, moving, displacement, SPACING), 0, atol=1e-9)
    np.testing.assert_allclose(landmark_errors(fixed, moving + (1, 0, 0), displacement, SPACING), SPACING[0])


def affine(matrix, shape=(7, 8, 9)):
    """The displacement A p of voxels."""
    return affine_displacement(torch.from_numpy(np.concatenate((np.eye(3) + matrix, np.zeros((3, 1))), 1))[None], shape)[0].numpy()


def test_the_determinant_of_an_affine_field_is_known_and_a_mirror_folds_everything():
    matrix = 0.2 * np.random.default_rng(0).standard_normal((3, 3))
    found = regularity(affine(matrix))
    assert found["sd_log_j"] < 1e-9 and found["folded"] == 0
    assert regularity(affine(np.diag((-2.0, 0.0, 0.0)))) == {"sd_log_j": pytest.approx(0, abs=1e-9), "folded": 1.0}


def test_the_spread_of_the_logarithm_is_taken_without_adding_anything():
    """u = a p^2 / 2 along z has J = 1 + a p inside."""
    shape, a = (40, 4, 4), 0.05
    z = np.arange(shape[0])
    displacement = np.zeros((3, *shape))
    displacement[0] = (a * z**2 / 2)[:, None, None]
    mask = np.zeros(shape, bool)
    mask[1:-1] = True
    expected = np.log(1 + a * z[1:-1]).std()
    assert regularity(displacement, mask)["sd_log_j"] == pytest.approx(expected)
    assert np.log(4 + a * z[1:-1]).std() < 0.5 * expected


def test_determinants_are_those_of_simpleitk_with_any_spacing():
    rng, shape = np.random.default_rng(0), (9, 10, 11)
    displacement = 0.8 * rng.standard_normal((3, *shape))
    mm = displacement * np.reshape(SPACING, (3, 1, 1, 1))
    image = SimpleITK.GetImageFromArray(np.moveaxis(mm[::-1], 0, -1).copy(), isVector=True)
    image.SetSpacing(SPACING[::-1])
    expected = SimpleITK.GetArrayFromImage(SimpleITK.DisplacementFieldJacobianDeterminant(image))[1:-1, 1:-1, 1:-1]
    inside = np.zeros(shape, bool)
    inside[1:-1, 1:-1, 1:-1] = True
    found = regularity(displacement, inside)
    assert (expected <= 0).mean() > 0 and found["folded"] == pytest.approx((expected <= 0).mean())
    assert found["sd_log_j"] == pytest.approx(np.log(expected.clip(1e-9)).std(), rel=1e-5)
