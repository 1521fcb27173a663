"""Places of tokens in mm: the same anatomy has the same place in both views, whatever the crops."""

import itertools
import math

import numpy as np
import pytest
import torch

from nnssl_ext.data.spatial import make_affine, rotation_matrix
from nnssl_ext.nn.places import composed, sine_cosine, token_places

SIZE, TOKEN, SPACING = (8, 12, 24), (2, 4, 8), (5.0, 1.5, 0.8)
MIRRORS = [(False, False, False), (True, False, False), (False, True, True), (True, True, True)]


def affine(center, mirrored=(False, False, False), degrees=(0, 0, 0), zoom=(1, 1, 1)):
    made = make_affine(center, SIZE, SPACING, rotation_matrix(np.array(degrees)), np.array(zoom, float), np.array(mirrored))
    return torch.from_numpy(made)[None]


def centres(view):
    """Of the tokens, in voxels of the case: the mean over each token's voxels; in row-major order."""
    found = []
    for cell in itertools.product(*(range(n // t) for n, t in zip(SIZE, TOKEN))):
        voxels = itertools.product(*(range(c * t, (c + 1) * t) for c, t in zip(cell, TOKEN)))
        found.append(np.mean([view[0, :, :3].numpy() @ voxel + view[0, :, 3].numpy() for voxel in voxels], 0))
    return np.array(found)


@pytest.mark.parametrize("mirrored", MIRRORS, ids=str)
@pytest.mark.parametrize("degrees", [(0, 0, 0), (10, -20, 30)], ids=str)
def test_places_are_those_of_plain_loops_over_voxels(mirrored, degrees):
    a, b = affine((20.5, 30.5, 40.5), mirrored, degrees), affine((21.5, 28.5, 45.5), mirrored[::-1], degrees[::-1])
    middle = a[0, :, :3].numpy() @ ((np.array(SIZE) - 1) / 2) + a[0, :, 3].numpy()
    mm = np.array(SPACING)[:, None] * a[0, :, :3].numpy()
    axes = mm / np.linalg.norm(mm, axis=0)  # directions of the view's axes in mm, orthogonal
    expected = ((centres(b) - middle) * SPACING) @ axes
    assert np.allclose(token_places(a, b, SIZE, TOKEN, SPACING)[0].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("mirrored", MIRRORS, ids=str)
def test_those_of_the_first_view_are_the_same_wherever_it_lies_and_symmetric(mirrored):
    places = token_places(a := affine((20.5, 30.5, 40.5), mirrored), a, SIZE, TOKEN, SPACING)
    assert torch.equal(places, token_places(b := affine((5.5, 9.5, 11.5)), b, SIZE, TOKEN, SPACING))
    assert torch.allclose(places, -places.flip(1))
    assert torch.equal(places[0, 1] - places[0, 0], torch.tensor([0, 0, TOKEN[2] * SPACING[2]], dtype=torch.float64))


@pytest.mark.parametrize("mirrored", MIRRORS, ids=str)
def test_shifting_both_crops_changes_nothing_and_shifting_the_second_by_a_token_shifts_its_places_by_that_token(mirrored):
    a, b = affine((20.5, 30.5, 40.5), mirrored), affine((21.5, 28.5, 45.5), mirrored)
    before = token_places(a, b, SIZE, TOKEN, SPACING)
    shift = torch.zeros(1, 3, 4, dtype=torch.float64)
    shift[0, :, 3] = torch.tensor([3.0, -7.0, 11.0])
    assert torch.equal(token_places(a + shift, b + shift, SIZE, TOKEN, SPACING), before)
    for axis in range(3):
        shift[0, :, 3] = torch.eye(3)[axis] * TOKEN[axis]
        expected = torch.zeros(3, dtype=torch.float64)
        expected[axis] = (-1 if mirrored[axis] else 1) * TOKEN[axis] * SPACING[axis]
        assert torch.allclose(token_places(a, b + shift, SIZE, TOKEN, SPACING) - before, expected.expand_as(before), atol=1e-12)


@pytest.mark.parametrize(("one", "other"), list(itertools.product(MIRRORS, MIRRORS)), ids=str)
def test_the_same_anatomy_has_the_same_place_in_crops_that_are_mirrored_differently(one, other):
    a, b = affine((20.5, 30.5, 40.5), one), affine((22.5, 26.5, 48.5), other)  # a token further along each axis
    here, there = (token_places(a, view, SIZE, TOKEN, SPACING)[0] for view in (a, b))
    matches = [(i, j) for (i, p), (j, q) in itertools.product(enumerate(centres(a)), enumerate(centres(b))) if np.allclose(p, q)]
    assert len(matches) == math.prod(n // t - 1 for n, t in zip(SIZE, TOKEN))
    for i, j in matches:
        assert torch.allclose(here[i], there[j], atol=1e-12)


def test_a_zoomed_first_view_has_its_places_in_mm_as_well():
    a = affine((20.5, 30.5, 40.5), zoom=(1.5, 1.5, 1.5))
    places = token_places(a, a, SIZE, TOKEN, SPACING)[0]
    assert torch.allclose(places[1] - places[0], torch.tensor([0, 0, 1.5 * TOKEN[2] * SPACING[2]], dtype=torch.float64))


def test_affines_are_applied_one_after_the_other():
    one, other = affine((20.5, 30.5, 40.5), degrees=(10, 20, 30)), affine((3, 4, 5), (True, False, True))
    point = torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64)
    assert torch.allclose(composed(one, other)[0] @ point, one[0] @ torch.cat((other[0] @ point, point[3:])))


@pytest.mark.parametrize("width", [48, 64, 32])
def test_the_embedding_is_that_of_plain_loops(width):
    places = torch.randn(2, 5, 3, dtype=torch.float64) * 10
    found, count = sine_cosine(places, width), width // 6
    assert found.shape == (2, 5, width)
    for b, n in np.ndindex(2, 5):
        angles = [places[b, n, axis].item() / 10000 ** (k / count) for axis in range(3) for k in range(count)]
        expected = [*map(math.sin, angles), *map(math.cos, angles), *[0.0] * (width - 6 * count)]
        assert np.allclose(found[b, n].numpy(), expected, atol=1e-12)
