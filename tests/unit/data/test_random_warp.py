"""Known warps: what they are, and that they are what bends a crop."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.loader import StepDataset
from nnssl_ext.data.partners import Partners
from nnssl_ext.data.random_warp import RegistrationPair, bend, random_warp, seen_through
from nnssl_ext.data.spatial import MILD, NONE, to_case
from nnssl_ext.data.views import Crop
from nnssl_ext.nn.warp import jacobian_determinant, warp
from tests.make_data import TINY_SHAPE, ArrayStore

SIZE = (12, 16, 8)
PARTNERS = Partners(tuple(map(str, range(8))), tuple(range(8)))


def pair(spatial=NONE, partners=PARTNERS, known=1.0, size=SIZE):
    return RegistrationPair(Crop(size, spatial), partners, known, 0.125)


def trilinear(volume, place):
    """One value of (z, y, x) by the definition; outside the nearest voxel counts."""
    value, place = 0.0, [min(max(p, 0), n - 1) for p, n in zip(place, volume.shape)]
    for corner in np.ndindex(2, 2, 2):
        cell = [min(math.floor(p) + c, n - 1) for p, c, n in zip(place, corner, volume.shape)]
        value += math.prod(p % 1 if c else 1 - p % 1 for p, c in zip(place, corner)) * volume[tuple(cell)]
    return value


@pytest.mark.parametrize("margin", [(0, 0, 0), (1, 2, 0)])
def test_a_volume_is_read_where_the_displacement_leads_to(margin):
    rng = np.random.default_rng(0)
    source, displacement = (rng.normal(0, 2, (channels, *shape)).astype(np.float32) for channels, shape in ((2, (4, 6, 5)), (3, (3, 4, 5))))
    found = bend(source, displacement, margin)
    for channel, *place in np.ndindex(found.shape):
        expected = trilinear(source[channel], [p + m + float(u[tuple(place)]) for p, m, u in zip(place, margin, displacement)])
        assert found[(channel, *place)] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("shape", [(32, 32, 32), (16, 40, 8), (5, 6, 7)])
@pytest.mark.parametrize("largest", [0.05, 0.2])
def test_a_warp_is_smooth_never_folds_and_is_as_large_as_asked_for(shape, largest):
    lengths = []
    for number in range(40):
        displacement = random_warp(shape, sample_rng(0, number), largest)
        assert displacement.shape == (3, *shape) and displacement.dtype == np.float32
        shares = np.abs(displacement).max((1, 2, 3)) / shape
        lengths.append(shares.max())
        jacobian = jacobian_determinant(torch.from_numpy(displacement)[None])
        assert float(jacobian.min()) > 0.1 and float(jacobian.max()) < 6
    assert largest / 4 < min(lengths) and 0.8 * largest < max(lengths) <= largest * 1.001


def test_nothing_is_moved_by_a_warp_of_size_zero_and_one_seed_gives_one_warp():
    assert not random_warp(SIZE, sample_rng(0, 0), 0.0).any()
    assert np.array_equal(random_warp(SIZE, sample_rng(0, 1), 0.1), random_warp(SIZE, sample_rng(0, 1), 0.1))


def test_a_warp_in_edges_is_the_same_for_crops_of_any_size():
    small, large = (random_warp((n, n, n), sample_rng(0, 3), 0.15) / n for n in (24, 48))
    inner = (slice(None), *(slice(1, -1),) * 3)
    assert np.allclose(large.reshape(3, 24, 2, 24, 2, 24, 2).mean((2, 4, 6))[inner], small[inner], atol=2e-3)


@pytest.mark.parametrize("spatial", [NONE, MILD], ids=["sliced", "turned"])
def test_the_known_displacement_warps_the_moving_crop_onto_the_fixed_one(spatial):
    store = ArrayStore(8, (40, 48, 44), channels=2)
    for number in range(4):
        views = pair(spatial, size=(16, 24, 20)).sample(store, 2, sample_rng(1, number))
        fixed, moving, displacement = (torch.from_numpy(views[name].image)[None] for name in ("fixed", "moving", "displacement"))
        places = np.stack(np.indices((16, 24, 20))) + views["displacement"].image
        inside = ((places >= 0) & (places <= np.array((15, 23, 19)).reshape(3, 1, 1, 1))).all(0)
        error = (warp(moving, displacement) - fixed)[0].abs().numpy()[:, inside]
        other = (warp(moving, -displacement) - fixed)[0].abs().numpy()[:, inside]
        assert inside.mean() > 0.6 and error.max() < (1e-4 if spatial is NONE else 0.05) and other.mean() > 0.1


def test_beyond_the_moving_crop_the_case_is_seen():
    store = ArrayStore(1, TINY_SHAPE)
    affine = np.column_stack((np.diag((1.0, -1.0, 1.0)), (4, 18, 6)))
    displacement = np.full((3, *SIZE), 2.5, np.float32) * np.array((1, 0, -1), np.float32).reshape(3, 1, 1, 1)
    found = seen_through(store, 0, affine, displacement)
    for place in np.ndindex(*SIZE):
        there = to_case(affine, np.array(place) + (2.5, 0, -2.5))
        assert found[(0, *place)] == pytest.approx(trilinear(store.arrays[0][0], there), abs=1e-5)


def test_pairs_are_known_as_often_as_asked_for_and_told_by_their_cases():
    store = ArrayStore(8, TINY_SHAPE)
    for known, partners, expected in ((0.0, PARTNERS, {False}), (1.0, PARTNERS, {True}), (0.5, PARTNERS, {False, True}), (0.0, None, {True})):
        batch = StepDataset(store, pair(known=known, partners=partners), range(8), 0, 12)[0]
        same = [a == b for a, b in zip(batch["fixed"].cases, batch["moving"].cases)]
        assert set(same) == expected
        assert [bool(u.any()) for u in batch["displacement"].image] == same


def test_the_fixed_crop_alone_has_other_intensities():
    always = replace(Crop(SIZE).intensity, brightness=replace(Crop(SIZE).intensity.brightness, p=1.0, low=2.0, high=2.0))
    for known in (0.0, 1.0):
        views = RegistrationPair(Crop(SIZE, intensity=always), PARTNERS, known, 0.1).sample(ArrayStore(8, TINY_SHAPE), 3, sample_rng(0, 0))
        assert views["fixed"].intensity and not views["moving"].intensity and not views["displacement"].intensity
