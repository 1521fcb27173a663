"""Displacement fields against slices, closed forms and fp64 differences."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from nnssl_ext.evaluation import deform
from nnssl_ext.nn.warp import affine_displacement, affine_matrix, compose, exponential, identity_grid, jacobian_determinant, warp

SHAPES = [(16, 16, 16), (8, 24, 12), (1, 5, 9), (48, 40, 64)]


def smooth(shape, scale, seed=0, batch=1, kind=torch.float64):
    """A displacement of a few waves that is zero at the border."""
    rng = torch.Generator().manual_seed(seed)
    waves = torch.stack(torch.meshgrid(*(torch.sin(torch.linspace(0, math.pi, n, dtype=kind)) for n in shape), indexing="ij")).prod(0)
    return scale * waves * torch.randn(batch, 3, 1, 1, 1, generator=rng, dtype=kind)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_displacement_of_zero_is_the_identity_to_a_millionth(shape):
    z, y, x = identity_grid(shape, torch.zeros(()))
    image = (torch.sin(z / 5) + torch.cos(y / 4) + torch.sin(x / 3)).repeat(2, 3, 1, 1, 1)
    zero = torch.zeros(2, 3, *shape)
    torch.testing.assert_close(warp(image, zero), image, rtol=0, atol=1e-6 if max(shape) <= 24 else 5e-6)  # single precision knows places to 1e-7 of an edge
    torch.testing.assert_close(warp(image.double(), zero.double()), image.double(), rtol=0, atol=1e-12)
    assert torch.equal(warp(image, zero, mode="nearest"), image)


@pytest.mark.parametrize(("mode", "padding"), [("bilinear", "border"), ("bilinear", "zeros"), ("nearest", "border")])
def test_a_shift_by_whole_voxels_is_a_slice(mode, padding):
    shape, shift = (6, 9, 12), (1, -2, 4)
    image = torch.randn(2, 2, *shape, dtype=torch.float64)
    displacement = torch.tensor(shift, dtype=torch.float64).view(1, 3, 1, 1, 1).expand(2, 3, *shape)
    expected = torch.zeros_like(image)
    for z, y, x in np.ndindex(shape):
        place = [p + s for p, s in zip((z, y, x), shift)]
        nearest = [min(max(p, 0), n - 1) for p, n in zip(place, shape)]
        if padding == "border" or nearest == place:
            expected[:, :, z, y, x] = image[:, :, nearest[0], nearest[1], nearest[2]]
    torch.testing.assert_close(warp(image, displacement, mode, padding), expected, rtol=0, atol=1e-12)


def test_warping_is_trilinear_interpolation():
    shape = (5, 7, 4)
    image, displacement = torch.randn(1, 1, *shape, dtype=torch.float64), 2 * torch.randn(1, 3, *shape, dtype=torch.float64)
    found = warp(image, displacement)[0, 0]
    for z, y, x in np.ndindex(shape):
        place = [min(max(p + float(displacement[0, axis, z, y, x]), 0), shape[axis] - 1) for axis, p in enumerate((z, y, x))]
        first = [min(int(p), n - 2) for p, n in zip(place, shape)]
        expected = 0.0
        for corner in np.ndindex(2, 2, 2):
            weight = math.prod(p - f if c else 1 - (p - f) for p, f, c in zip(place, first, corner))
            expected += weight * float(image[(0, 0, *(f + c for f, c in zip(first, corner)))])
        assert float(found[z, y, x]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_half_precision_around_it_changes_nothing(kind):
    image, displacement = torch.randn(1, 2, 6, 8, 10).to(kind), smooth((6, 8, 10), 2, kind=torch.float32)
    expected = warp(image.float(), displacement)
    with torch.autocast("cpu", torch.bfloat16):
        found = warp(image, displacement)
        matrix = affine_matrix(torch.full((1, 12), 0.1).to(kind), (6, 8, 10))
        moved = affine_displacement(matrix, (6, 8, 10))
    assert found.dtype == matrix.dtype == moved.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["image", "displacement", "matrix", "velocity"])
def test_gradients_are_those_of_differences(mode):
    torch.manual_seed(0)
    shape = (3, 4, 5)
    image, inner = torch.randn(1, 2, *shape, dtype=torch.float64), 0.3 * torch.rand(1, 3, *shape, dtype=torch.float64) + 0.1
    functions = {
        "image": (lambda x: warp(x, inner), image),
        "displacement": (lambda u: warp(image, u, padding="zeros"), inner),
        "matrix": (lambda p: affine_displacement(affine_matrix(p, shape, (3.0, 1.0, 2.0)), shape), torch.randn(2, 12, dtype=torch.float64)),
        "velocity": (lambda v: jacobian_determinant(exponential(v, 3)), inner),
    }
    function, start = functions[mode]
    assert gradcheck(function, (start.clone().requires_grad_(),))


# Affine maps


def test_parameters_of_zero_are_the_identity_and_have_gradients():
    parameters = torch.zeros(2, 12, dtype=torch.float64, requires_grad=True)
    matrix = affine_matrix(parameters, (8, 12, 10), (3.0, 1.0, 1.0))
    assert torch.equal(matrix, torch.eye(3, 4, dtype=torch.float64).expand(2, 3, 4))
    displacement = affine_displacement(matrix, (8, 12, 10))
    assert not displacement.any()
    (displacement * torch.randn_like(displacement)).sum().backward()
    assert bool((parameters.grad != 0).all())


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.8, 1.2)])
def test_an_antisymmetric_matrix_is_a_rotation_in_mm_about_the_middle(spacing):
    shape, axes = (9, 12, 14), (0, 1)
    parameters = torch.zeros(1, 12, dtype=torch.float64)
    parameters[0, 1], parameters[0, 3] = -100, 100  # saturated: the largest angle
    matrix, edge = affine_matrix(parameters, shape, spacing)[0, :, :3], torch.tensor(spacing, dtype=torch.float64)
    expected = torch.eye(3, dtype=torch.float64)
    expected[axes, axes] = math.cos(0.35)
    expected[0, 1], expected[1, 0] = -math.sin(0.35), math.sin(0.35)
    torch.testing.assert_close(matrix * edge[:, None] / edge, expected)
    moved = identity_grid(shape, edge) + affine_displacement(affine_matrix(parameters, shape, spacing), shape)[0]
    middle = (torch.tensor(shape, dtype=torch.float64) - 1) / 2
    for place in ((0, 0, 0), (8, 3, 5), (4, 11, 13)):
        expected_place = middle + matrix @ (torch.tensor(place, dtype=torch.float64) - middle)
        torch.testing.assert_close(moved[(slice(None), *place)], expected_place)


def test_the_largest_parameters_zoom_and_shift_as_far_as_said_and_never_mirror():
    parameters = torch.zeros(1, 12, dtype=torch.float64)
    parameters[0, [0, 9]] = 100
    matrix = affine_matrix(parameters, (20, 8, 8))[0]
    assert float(matrix[0, 0]) == pytest.approx(math.exp(0.35)) and matrix[:, 3].tolist() == pytest.approx([5, 0, 0])
    many = affine_matrix(5 * torch.randn(200, 12, dtype=torch.float64), (8, 8, 8), (3.0, 1.0, 1.0))
    assert float(torch.linalg.det(many[:, :, :3]).min()) > 0.3


# Composition, exponential, Jacobian


def test_warping_by_a_composition_is_warping_twice():
    shape = (14, 10, 12)
    ramp = identity_grid(shape, torch.zeros((), dtype=torch.float64))[None]  # linear: interpolation is exact
    first, second = smooth(shape, 1.0, 1), smooth(shape, 1.5, 2)
    torch.testing.assert_close(warp(ramp, compose(first, second)), warp(warp(ramp, second), first), atol=0.02, rtol=0)
    affine = affine_displacement(torch.tensor([[[1.05, 0, 0, 0.3], [0, 1, 0.02, 0], [0, 0, 0.9, -0.2]]], dtype=torch.float64), shape)
    whole = warp(affine, first)
    torch.testing.assert_close(compose(first, affine), first + whole, rtol=0, atol=0)


@pytest.mark.parametrize("squarings", [0, 1, 7])
def test_a_constant_velocity_is_its_own_displacement(squarings):
    velocity = torch.tensor([1.5, -0.25, 3.0], dtype=torch.float64).view(1, 3, 1, 1, 1).repeat(2, 1, 5, 8, 6)
    torch.testing.assert_close(exponential(velocity, squarings), velocity, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(24, 24, 24), (12, 32, 20)])
def test_the_exponential_of_minus_a_velocity_undoes_that_of_the_velocity(shape):
    velocity = smooth(shape, 1.5)
    there, back = exponential(velocity), exponential(-velocity)
    both = compose(there, back)
    assert float(both.abs().max()) < 0.03 * float(there.abs().max()) and float(there.abs().max()) > 1
    assert float(jacobian_determinant(there).min()) > 0


def test_the_exponential_of_a_linear_velocity_is_that_of_its_matrix():
    shape, rate = (20, 20, 20), torch.tensor([0.1, -0.05, 0.0], dtype=torch.float64)
    velocity = rate.view(1, 3, 1, 1, 1) * (identity_grid(shape, rate) - 9.5)
    expected = (rate.exp() - 1).view(1, 3, 1, 1, 1) * (identity_grid(shape, rate) - 9.5)
    inner = (..., slice(4, -4), slice(4, -4), slice(4, -4))
    torch.testing.assert_close(exponential(velocity)[inner], expected[inner], rtol=0, atol=5e-3)


@pytest.mark.parametrize("shape", [(6, 9, 7), (2, 3, 2)])
def test_the_jacobian_of_a_linear_map_is_its_determinant(shape):
    torch.manual_seed(0)
    matrix = 0.3 * torch.randn(4, 3, 4, dtype=torch.float64) + torch.eye(3, 4, dtype=torch.float64)
    found = jacobian_determinant(affine_displacement(matrix, shape))
    expected = torch.linalg.det(matrix[:, :, :3]).view(4, 1, 1, 1).expand(4, *shape)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_fold_is_negative_and_a_mirror_image_minus_one():
    places = identity_grid((6, 6, 6), torch.zeros((), dtype=torch.float64))
    folded = torch.zeros(1, 3, 6, 6, 6, dtype=torch.float64)
    folded[0, 0] = -2 * (places[0] - 2.5)
    torch.testing.assert_close(jacobian_determinant(folded), -torch.ones(1, 6, 6, 6, dtype=torch.float64))
    bump = torch.zeros(1, 3, 6, 6, 6, dtype=torch.float64)
    bump[0, 2, 3, 3, 3] = 3.0
    assert float(jacobian_determinant(bump).min()) < 0


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.7, 1.3)])
def test_the_jacobian_in_voxels_is_the_jacobian_in_mm(spacing):
    displacement = torch.randn(1, 3, 5, 7, 6, dtype=torch.float64)
    in_mm = displacement[0].numpy() * np.array(spacing).reshape(3, 1, 1, 1)
    assert np.allclose(jacobian_determinant(displacement)[0].numpy(), deform.jacobian_determinant(in_mm, spacing), rtol=1e-9, atol=1e-9)
