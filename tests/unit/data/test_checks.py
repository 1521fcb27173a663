"""Checks of the data before a training."""

import numpy as np
import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.plan import Normalization
from nnssl_ext.data.checks import LARGEST, check_normalized, distinct_crops
from nnssl_ext.evaluation.phantom import make_phantom
from nnssl_ext.preprocessing.normalize import CT, Percentile, ZScore
from tests.make_data import ArrayStore


def store_of(*arrays: np.ndarray) -> ArrayStore:
    store = ArrayStore(0)
    store.arrays = [np.asarray(array, np.float32).reshape(-1, *array.shape[-3:]) for array in arrays]
    return store


def collection(volumes) -> Normalization:
    """What the planner makes of these bodies."""
    body = np.concatenate([phantom.image[phantom.body] for phantom in volumes])
    return Normalization("ct", float(body.mean()), float(body.std()), *np.percentile(body, (0.5, 99.5)).tolist())


PHANTOMS = {modality: [make_phantom(0, i, (24, 32, 32), (10.0, 8.0, 8.0), modality) for i in range(3)] for modality in ("CT", "MR")}
HEAVY = np.random.default_rng(0).standard_t(1.5, (40, 40, 40)).astype(np.float32)  # no variance in the limit


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("scheme", [CT, ZScore, Percentile])
def test_every_scheme_of_normalisation_passes(modality, scheme):
    plan, normalizer = collection(PHANTOMS[modality]), scheme()
    check_normalized(store_of(*(normalizer.apply(p.image, normalizer.parameters(p.image, p.body, plan)) for p in PHANTOMS[modality])), range(3))


def test_clipped_scores_with_the_heaviest_tails_pass():
    low, high = np.percentile(HEAVY, (0.5, 99.5))
    check_normalized(store_of(np.clip((HEAVY - HEAVY.mean()) / HEAVY.std(), low, high), np.clip((HEAVY - HEAVY.mean()) / HEAVY.std(), -14.1, 14.1)), range(2))
    rare = np.where(np.random.default_rng(1).random((40, 40, 40)) < 0.005, 1.0, 0.0)  # as far out as 0.5 % of the voxels can be
    scores = (rare - rare.mean()) / rare.std()
    assert 13 < scores.max() < LARGEST
    check_normalized(store_of(scores, np.full((8, 8, 8), scores.max()), np.zeros((8, 8, 8))), range(3))


@pytest.mark.parametrize(
    "raw",
    [
        PHANTOMS["CT"][0].image,
        PHANTOMS["CT"][0].image[8:16, 12:20, 12:20],
        1000 * PHANTOMS["MR"][0].image,
        255 * (PHANTOMS["MR"][0].image / PHANTOMS["MR"][0].image.max()),
        np.linspace(0, 255, 512).reshape(8, 8, 8),
    ],
    ids=["HU", "HU of soft tissue", "MR", "MR as bytes", "bytes"],
)
def test_raw_values_are_refused_and_the_error_says_which_case(raw):
    fine = np.random.default_rng(0).standard_normal((8, 8, 8))
    with pytest.raises(UserError, match="not normalised") as error:
        check_normalized(store_of(fine, raw, fine), range(3))
    assert error.value.where == "case1, channel 0" and "preprocess" in error.value.fix and str(error.value).count("\n") == 2
    check_normalized(store_of(fine, raw, fine), [0, 2])


def test_one_raw_channel_beside_a_normalised_one_is_refused():
    fine = np.random.default_rng(0).standard_normal((8, 8, 8))
    with pytest.raises(UserError, match="not normalised") as error:
        check_normalized(store_of(np.stack((fine, 255 * np.abs(fine)))), [0])
    assert error.value.where == "case0, channel 1"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value):
    broken = np.zeros((70, 8, 9))
    broken[35, 4, 4] = value
    with pytest.raises(UserError, match="not finite") as error:
        check_normalized(store_of(np.zeros((8, 8, 8)), broken), range(2))
    assert error.value.where == "case1, channel 0"


def test_at_most_eight_boxes_of_64_voxels_are_read_spread_over_all_cases():
    class Counting(ArrayStore):
        def read(self, case, box=None):
            self.seen.append((case, [high - low for low, high in box]))
            return super().read(case, box)

    for cases in (1, 7, 8, 9, 20):
        store = Counting(cases, (70, 8, 66))
        store.seen = []
        check_normalized(store, range(cases))
        assert min(cases, 5) <= len(store.seen) <= 8 and all(edges == [64, 8, 64] for _, edges in store.seen)
        assert max(case for case, _ in store.seen) >= 0.7 * (cases - 1)


def test_distinct_crops_are_counted_in_patches():
    store = store_of(np.zeros((1, 16, 16, 16)), np.zeros((1, 8, 16, 24)), np.zeros((1, 4, 4, 4)))
    assert distinct_crops(store, [0, 1], (8, 8, 8)) == 8 + 6
    assert distinct_crops(store, [2], (8, 8, 8)) == 1 / 8
