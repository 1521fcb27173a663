"""Pairs of subjects: who, where, and what is corrupted."""

import numpy as np
import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.loader import StepDataset
from nnssl_ext.data.partners import MatchedPair, Partners, same_place, training_partners
from nnssl_ext.data.spatial import MILD, NONE, bounds, is_slicing, make_affine, to_case
from nnssl_ext.data.views import Crop
from tests.make_data import TINY_SHAPE, ArrayStore

SIZE = (16, 12, 8)
SUBJECTS = ("a", "a", "b", "c", "c", "c", "d", "e")


def negated(image, rng):
    return -image


def pair(spatial=NONE, cases=(0, 1, 2, 3, 4, 5)):
    return MatchedPair(Crop(SIZE, spatial), negated, Partners(SUBJECTS, cases))


class Mixed(ArrayStore):
    """Cases of two sizes, and one that is smaller than the crop."""

    def __init__(self):
        super().__init__(8, TINY_SHAPE)
        self.arrays[1] = self.arrays[1][:, :10, :, :7]
        self.arrays[2] = np.repeat(self.arrays[2], 2, axis=2)

    def read(self, case, box=None):
        return super().read(case, box)


def test_partners_are_of_other_subjects_and_every_one_of_these_occurs():
    partners = Partners(SUBJECTS, (0, 1, 2, 3, 4, 5))
    for case in range(8):
        found = {partners.draw(case, sample_rng(2, n)) for n in range(40)}
        assert found == {other for other in range(6) if SUBJECTS[other] != SUBJECTS[case]}


def test_partners_are_training_cases_and_one_subject_alone_is_refused():
    store = ArrayStore(8, TINY_SHAPE)
    found = training_partners(store, 0, "SomeTrainer", "Dataset801_Test")
    assert len(found.cases) == 7 and len(set(found.subjects)) == 8
    store.subject = lambda case: "a"
    with pytest.raises(UserError, match="SomeTrainer needs cases of two subjects") as error:
        training_partners(store, 0, "SomeTrainer", "Dataset801_Test")
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("spatial", [NONE, Crop(SIZE).spatial], ids=["plain", "mirrored"])
def test_both_crops_come_from_where_they_say_and_one_of_them_is_corrupted(spatial):
    store = ArrayStore(8, TINY_SHAPE)
    for number in range(8):
        views = pair(spatial).sample(store, 7, sample_rng(3, number))
        assert set(views) == {"target", "image", "moving"} and np.array_equal(views["image"].image, -views["target"].image)
        assert views["target"].case is None and SUBJECTS[views["moving"].case] != "e"
        for view, case in ((views["target"], 7), (views["moving"], views["moving"].case)):
            places = to_case(view.affine, np.stack(np.indices(SIZE), -1)).astype(int)
            assert np.array_equal(view.image[0], store.arrays[case][0][tuple(np.moveaxis(places, -1, 0))])
        assert np.array_equal(views["target"].affine, views["moving"].affine)  # cases of one size


def test_the_same_place_is_the_same_share_of_the_way_through_the_other_case():
    affine = make_affine((19.5, 29.5, 39.5), (8, 8, 8), (1, 1, 1), np.eye(3), np.ones(3), np.array([False, True, False]))
    found = same_place(affine, (8, 8, 8), (40, 60, 80), (80, 30, 80))
    assert np.array_equal(found[:, :3], affine[:, :3]) and np.allclose(to_case(found, np.full(3, 3.5)), (39.5, 14.5, 39.5), atol=0.51)
    assert is_slicing(found)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("start", [(0, 0, 0), (24, 48, 72), (5, 17, 40)])
def test_a_crop_stays_inside_the_other_case_where_it_fits_and_is_centred_where_it_does_not(start, mirrored):
    centre = np.array(start) + (np.array(SIZE) - 1) / 2
    affine = make_affine(centre, SIZE, (1, 1, 1), np.eye(3), np.ones(3), np.full(3, mirrored))
    for other in ((20, 15, 11), (16, 12, 8), (200, 100, 50)):
        box = bounds(same_place(affine, SIZE, (40, 60, 80), other), SIZE)
        assert all(0 <= low < high <= n for (low, high), n in zip(box, other))
    (low, high), *_ = bounds(same_place(affine, SIZE, (40, 60, 80), (6, 60, 80)), SIZE)
    assert abs((low + high - 1) / 2 - 2.5) <= 0.5


def test_cases_of_all_sizes_and_turned_crops_are_read():
    store = Mixed()
    for number in range(6):
        for case in (2, 7):
            views = pair(MILD).sample(store, case, sample_rng(4, number))
            assert all(view.image.shape == (1, *SIZE) and np.isfinite(view.image).all() for view in views.values())
            assert np.array_equal(views["moving"].affine[:, :3], views["target"].affine[:, :3])


def test_two_ranks_see_the_pairs_that_one_would_see():
    def batch(count, rank, ranks):
        return StepDataset(ArrayStore(8, TINY_SHAPE), pair(), [0, 1, 2, 3], 3, count, rank=rank, ranks=ranks)[5]

    whole, halves = batch(2, 0, 1), [batch(1, rank, 2) for rank in range(2)]
    for name, view in whole.items():
        assert view.cases == halves[0][name].cases + halves[1][name].cases
        assert all(np.array_equal(view.image[i], halves[i][name].image[0]) for i in range(2))
