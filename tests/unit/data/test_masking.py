"""Block masks."""

import math
from dataclasses import replace

import numpy as np
import pytest

from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data import augment
from nnssl_ext.data.masking import MaskedCrop, MaskedMultiCrop, block_grid, mask_block, random_blocks, random_boxes, stratified_counts
from nnssl_ext.data.spatial import MILD
from nnssl_ext.data.views import Crop, MultiCrop
from tests.make_data import ArrayStore

CROPS = MultiCrop((16, 24, 8), (8, 12, 4), 2, spatial=MILD, intensity=augment.NNUNET)
MASKED = MaskedMultiCrop(CROPS, (4, 4, 4))
GRIDS = [(4, 4, 4), (6, 6, 6), (12, 12, 12), (20, 20, 20), (8, 12, 16)]


@pytest.mark.parametrize(
    ("grid", "ratio", "hidden"), [((4, 4, 4), 0.75, 48), ((2, 3, 4), 0.75, 18), ((2, 1, 1), 0.75, 1), ((1, 1, 3), 0.01, 1), ((2, 2, 2), 0.999, 7)]
)
def test_the_share_of_hidden_blocks_is_exact_and_never_all_or_none(grid, ratio, hidden):
    for i in range(20):
        mask = random_blocks(grid, ratio, sample_rng(0, i))
        assert mask.dtype == bool and mask.shape == grid and mask.sum() == hidden


def test_every_block_is_hidden_equally_often():
    counts = sum(random_blocks((2, 3, 4), 0.75, sample_rng(0, i)).astype(int) for i in range(4000))
    assert np.abs(counts / 4000 - 0.75).max() < 0.04


def test_blocks_are_sixteen_voxels_and_smaller_on_small_patches():
    assert mask_block((64, 96, 128)) == (16, 16, 16)
    assert mask_block((32, 48, 16)) == (8, 12, 4)
    assert mask_block((2, 1, 64)) == (2, 1, 16)
    assert block_grid((40, 32, 20), (16, 16, 16)) == (3, 2, 2)


def test_a_masked_crop_is_a_pure_function_of_seed_and_index():
    store, spec = ArrayStore(), MaskedCrop(Crop((16, 24, 8)), (8, 8, 8), 0.75)
    first, again, other = (spec.sample(store, 0, sample_rng(5, n))["image"] for n in (7, 7, 8))
    assert np.array_equal(first.image, again.image) and np.array_equal(first.mask, again.mask)
    assert first.mask.shape == (2, 3, 1) and first.mask.sum() == 4
    assert not np.array_equal(first.image, other.image)


def test_a_mask_of_finer_cells_hides_whole_blocks_also_where_the_last_one_is_cut():
    store, crop = ArrayStore(), Crop((16, 24, 20))
    coarse, fine = (MaskedCrop(crop, (8, 8, 12), 0.5, cell).sample(store, 0, sample_rng(5, 7))["image"] for cell in (None, (4, 2, 4)))
    assert np.array_equal(coarse.image, fine.image) and coarse.mask.shape == (2, 3, 2) and fine.mask.shape == (4, 12, 5)
    for z, y, x in np.ndindex(fine.mask.shape):
        assert fine.mask[z, y, x] == coarse.mask[z // 2, y // 4, x // 3]


def with_hidden_neighbour(mask: np.ndarray) -> int:
    """Hidden cells one of whose six faces touches another hidden cell."""
    padded, touched = np.pad(mask, 1), np.zeros(mask.shape, bool)
    for axis in range(3):
        for step in (-1, 1):
            touched |= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
    return int((mask & touched).sum())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_two_thousand_masks_hide_what_is_asked_for_in_contiguous_blocks(grid):
    cells = math.prod(grid)
    counts = np.concatenate([stratified_counts(20, math.ceil(0.3 * cells), math.floor(0.6 * cells), sample_rng(0, i, "counts")) for i in range(100)])
    touching = 0
    for i, count in enumerate(counts.tolist()):
        mask = random_boxes(grid, count, sample_rng(0, i))
        assert mask.dtype == bool and mask.shape == grid
        assert mask.sum() == count and 0.3 * cells <= count <= 0.6 * cells
        touching += with_hidden_neighbour(mask)
    assert touching >= 0.95 * counts.sum()


def test_scattered_masks_of_the_same_size_are_not_contiguous():
    masks = [random_blocks((12, 12, 12), 0.3, sample_rng(0, i)) for i in range(20)]
    assert sum(map(with_hidden_neighbour, masks)) < 0.95 * sum(mask.sum() for mask in masks)


@pytest.mark.parametrize("grid", [(2, 2, 2), (1, 1, 1), (1, 3, 5), (4, 4, 4), (1, 1, 40), (2, 20, 20)], ids=str)
def test_any_number_of_cells_of_any_grid_can_be_hidden(grid):
    for count in range(0, math.prod(grid) + 1, max(1, math.prod(grid) // 40)):
        assert random_boxes(grid, count, sample_rng(1, count)).sum() == count
    assert random_boxes(grid, math.prod(grid), sample_rng(1, 0)).all()


@pytest.mark.parametrize("grid", [(6, 6, 6), (3, 8, 8)], ids=str)
def test_corners_are_hidden_about_as_often_as_the_middle(grid):
    share = np.mean([random_boxes(grid, math.prod(grid) * 9 // 20, sample_rng(2, i)) for i in range(2000)], axis=0)
    assert 0.38 < share.min() and share.max() < 0.52


def test_no_axis_and_no_direction_is_preferred():
    masks = [random_boxes((8, 8, 8), 200, sample_rng(3, i)) for i in range(1000)]
    borders = [np.mean([np.diff(mask.astype(int), axis=axis).astype(bool).sum() for mask in masks]) for axis in range(3)]
    assert max(borders) < 1.04 * min(borders)
    centres = np.mean([np.argwhere(mask).mean(0) for mask in masks], axis=0)
    assert np.abs(centres - 3.5).max() < 0.1


@pytest.mark.parametrize("strata", [1, 5, 32])
def test_the_means_of_the_strata_of_hidden_counts_are_linear(strata):
    drawn = np.array([stratified_counts(strata, 20, 38, sample_rng(4, i)) for i in range(20000 // strata)])
    assert drawn.min() >= 20 and drawn.max() <= 38
    expected = 20 + 18 * (np.arange(strata) + 0.5) / strata
    assert np.abs(drawn.mean(0) - expected).max() < 5 * drawn.std(0).max() / len(drawn) ** 0.5 + 0.02


def test_every_stratum_gets_one_count_wherever_the_strata_are_wider_than_the_rounding():
    for i in range(200):
        drawn = stratified_counts(6, 600, 1200, sample_rng(5, i))
        assert ((drawn >= 600 + 100 * np.arange(6)) & (drawn <= 700 + 100 * np.arange(6))).all()


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize(("probability", "ratio"), [(0.5, (0.3, 0.6)), (0.29, (0.1, 0.5)), (1.0, (0.5, 0.5)), (0.0, (0.3, 0.6))])
def test_exactly_the_wanted_share_of_a_batch_is_masked(samples, probability, ratio):
    spec = replace(MASKED, probability=probability, ratio=ratio)
    for i in range(20):
        counts = np.array([one.counts for one in spec.of_batch(samples, sample_rng(6, i))])
        assert counts.shape == (samples, 2)
        masked = counts[counts > 0]
        assert len(masked) == int(round(probability * 100)) * 2 * samples // 100
        assert (masked >= ratio[0] * 48).all() and (masked <= ratio[1] * 48).all()


def test_every_crop_of_a_batch_is_masked_equally_often_and_equally_much():
    counts = np.array([[one.counts for one in MASKED.of_batch(4, sample_rng(7, i))] for i in range(4000)]).reshape(4000, 8)
    assert np.abs((counts > 0).mean(0) - 0.5).max() < 0.04
    assert np.abs(counts.sum(0) / (counts > 0).sum(0) - 0.5 * (15 + 28)).max() < 0.4


def test_masks_leave_the_crops_as_they_are():
    store = ArrayStore()
    for i, spec in enumerate(MASKED.of_batch(8, sample_rng(8, 0))):
        plain, masked = CROPS.sample(store, 0, sample_rng(8, i)), spec.sample(store, 0, sample_rng(8, i))
        assert list(plain) == list(masked)
        for name, view in masked.items():
            assert np.array_equal(view.image, plain[name].image) and np.array_equal(view.affine, plain[name].affine) and view.intensity == plain[name].intensity
        assert [masked[f"global_{k}"].mask.sum() for k in range(2)] == list(spec.counts)
        assert masked["global_0"].mask.shape == (4, 6, 2) and masked["local_0"].mask is None and masked["local_1"].mask is None


def test_a_sample_by_itself_has_the_masks_of_a_batch_of_one():
    for i in range(10):
        views = MASKED.sample(ArrayStore(), 0, sample_rng(9, i))
        assert sorted(bool(views[f"global_{k}"].mask.any()) for k in range(2)) == [False, True]
