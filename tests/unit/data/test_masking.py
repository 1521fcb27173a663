"""Block masks."""

import numpy as np
import pytest

from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.masking import MaskedCrop, block_grid, mask_block, random_blocks
from nnssl_ext.data.views import Crop
from tests.make_data import ArrayStore


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
