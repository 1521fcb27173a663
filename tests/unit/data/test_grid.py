"""Grids of crops: they tile, whatever the size of the case, and overlaps are those of the voxels."""

from itertools import product

import numpy as np
import pytest
import torch

from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.grid import GridTargets, assembled, overlaps
from nnssl_ext.data.spatial import NONE, to_case
from tests.make_data import ArrayStore

GRID, SIZE = (1, 3, 2), (8, 4, 6)  # 8 x 12 x 12 voxels
SHAPES = [(30, 40, 35), (8, 12, 12), (7, 12, 13), (5, 9, 4), (40, 3, 2), (2, 2, 2)]


def sampled(shape, number=0, **options):
    store = ArrayStore(1, shape)
    return store, GridTargets(GRID, SIZE, **options).sample(store, 0, sample_rng(3, number))


def affines(views, kind):
    return torch.from_numpy(np.stack([view.affine for name, view in views.items() if name.startswith(kind)]))[None]


def shares(views, size=SIZE):
    return overlaps(affines(views, "target"), affines(views, "base"), size)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_target_is_covered_by_the_base_crops_to_a_hundred_percent_in_cases_of_any_size(shape):
    for number in range(5):
        found = shares(sampled(shape, number, targets=3)[1])
        assert found.shape == (3, 6) and bool((found >= 0).all())
        torch.testing.assert_close(found.sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_voxel_of_every_crop_lies_in_the_case_and_the_grid_spans_an_axis_that_is_too_short(shape):
    views = sampled(shape)[1]
    corners = np.array(list(product(*[(0, n - 1) for n in SIZE])))
    places = np.concatenate([to_case(view.affine, corners) for name, view in views.items() if name.startswith("base")])
    assert places.min() >= -1e-9 and bool((places <= np.array(shape) - 1 + 1e-9).all())
    for axis, voxels in enumerate(np.multiply(GRID, SIZE)):
        extent = np.ptp(places[:, axis])
        assert extent == pytest.approx(min(shape[axis], voxels) - 1)


def test_in_a_case_of_one_slice_all_crops_show_it():
    store, views = sampled((1, 30, 30))
    assert all(np.isfinite(view.image).all() and abs(np.linalg.det(view.affine[:, :3])) > 0 for view in views.values())
    assert all(np.abs(to_case(view.affine, np.array([0, 0, 0]))[0]) < 0.5 for view in views.values())
    assert float(shares(views).sum()) == pytest.approx(2)


def test_overlaps_are_counts_of_common_voxels():
    store, views = sampled((30, 40, 35), targets=4)

    def voxels(view):
        return {tuple(np.round(to_case(view.affine, np.array(place))).astype(int)) for place in product(*map(range, SIZE))}

    bases, targets = ([voxels(view) for name, view in views.items() if name.startswith(kind)] for kind in ("base", "target"))
    counted = [[len(target & base) / len(target) for base in bases] for target in targets]
    torch.testing.assert_close(shares(views), torch.tensor(counted, dtype=torch.float64))
    assert sum(len(one & other) for one, other in product(bases, bases)) == 6 * len(bases[0])  # none overlaps another


def test_overlaps_of_boxes_by_hand():
    def box(z, y, x, *signs):
        return np.column_stack((np.diag(signs or (1.0, 1.0, 1.0)), (z, y, x)))

    bases = torch.from_numpy(np.stack([box(0, 0, 0), box(0, 0, 4), box(0, 9, 0)]))[None]
    targets = torch.from_numpy(np.stack([box(0, 0, 1), box(0, 1, 2), box(3, 3, 7, -1.0, -1.0, -1.0), box(0.5, 0, 0, 0.5, 1.0, 1.0)]))[None]
    expected = torch.tensor([[0.75, 0.25, 0], [0.375, 0.375, 0], [0, 1, 0], [1, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(overlaps(targets, bases, (4, 4, 4))[0], expected)


def test_targets_lie_anywhere_in_the_grid_and_the_grid_anywhere_in_the_case():
    starts, grids = set(), set()
    for number in range(400):
        views = sampled((9, 13, 12), number, targets=1, spatial=NONE)[1]
        corner = views["base_0"].affine[:, 3]
        starts.add(tuple((views["target_0"].affine[:, 3] - corner).astype(int)))
        grids.add(tuple(corner.astype(int)))
    assert starts <= set(product([0], range(9), range(7))) and len(starts) > 60  # of 63
    assert grids == set(product(range(2), range(2), [0]))


@pytest.mark.parametrize("number", range(4))
def test_the_base_crops_together_are_the_part_of_the_case_that_they_tile(number):
    store, views = sampled((30, 40, 35), number)
    bases = [view for name, view in views.items() if name.startswith("base")]
    whole = assembled(torch.from_numpy(np.stack([view.image[0] for view in bases])), torch.from_numpy(bases[0].affine), GRID)
    low = np.min([to_case(bases[0].affine, np.array(place)) for place in product(*[(0, n - 1) for n in SIZE])], axis=0).astype(int)
    expected = store.arrays[0][0][tuple(slice(a, a + n) for a, n in zip(low, np.multiply(GRID, SIZE)))]
    assert np.array_equal(whole.numpy(), expected)


def test_all_crops_of_a_sample_are_mirrored_alike_and_not_those_of_every_sample():
    signs = [{tuple(np.sign(np.diag(view.affine[:, :3]))) for view in sampled((30, 40, 35), number)[1].values()} for number in range(30)]
    assert all(len(of_one) == 1 for of_one in signs) and len(set.union(*signs)) > 4
