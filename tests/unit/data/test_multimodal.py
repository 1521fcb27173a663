"""One place of a visit in every modality: how many tokens are visible, where crops come from, what is missing."""

from collections import Counter

import numpy as np
import pytest

from nnssl_ext.core.geometry import Geometry
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.loader import StepDataset
from nnssl_ext.data.multimodal import MaskedVisit, dirichlet_split
from nnssl_ext.data.sessions import read_sessions
from nnssl_ext.data.spatial import NONE, to_case
from nnssl_ext.data.views import Crop
from tests.make_data import TINY_SHAPE, ArrayStore, PairedStore

SIZE, TOKEN, VISIBLE = (16, 8, 12), (4, 4, 4), 8  # 24 tokens of each modality


def visit(store, crop=None, modalities=("CT", "MR"), visible=VISIBLE):
    return MaskedVisit(crop or Crop(SIZE, body=0.0), read_sessions(store), modalities, TOKEN, visible)


class Offset(PairedStore):
    """MR images begin 2, 3 and 1 voxels later in the world, or `far` mm along x; the last visit has none."""

    far = 0.0

    def geometry(self, case):
        origin = ((self.far, 0.0, 0.0) if self.far else (3.0, 9.0, 6.0)) if case % 2 else (0.0, 0.0, 0.0)
        return Geometry(self.shape(case), self.spacing, origin)

    def info(self, case):
        found = super().info(case)
        return {**found, "modalities": ["CT"], "session": str(case)} if case >= 6 else found


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_shares_sum_exactly_are_equal_on_average_and_uniform(parts):
    drawn = np.array([dirichlet_split(60, parts, sample_rng(0, n)) for n in range(4000)])
    assert (drawn.sum(1) == 60).all() and (drawn >= 0).all()
    deviation = 60 * np.sqrt((parts - 1) / (parts**2 * (parts + 1)))  # of a share of a flat Dirichlet distribution
    assert np.abs(drawn.mean(0) - 60 / parts).max() <= 4 * deviation / np.sqrt(4000)
    assert np.allclose(drawn.std(0), deviation, rtol=0.05)
    if parts == 2:  # uniform: each tenth of the numbers is drawn about as often
        assert all(320 <= count <= 480 for count in np.histogram(drawn[:, 0], 10, (0, 60))[0])


def test_few_tokens_are_split_without_favouring_the_first_or_the_last_modality():
    drawn = np.array([dirichlet_split(1, 3, sample_rng(1, n)) for n in range(3000)])
    assert (drawn.sum(1) == 1).all() and np.abs(drawn.mean(0) - 1 / 3).max() < 0.04


def test_exactly_so_many_tokens_are_visible_in_every_sample_and_each_modality_has_its_turn():
    store, counts = PairedStore(), []
    for number in range(40):
        views = visit(store).sample(store, number % 8, sample_rng(2, number))
        assert list(views) == ["CT", "MR"] and all(view.mask.shape == (4, 2, 3) for view in views.values())
        counts.append([int((~view.mask).sum()) for view in views.values()])
    assert all(sum(pair) == VISIBLE for pair in counts)
    assert {min(pair) for pair in counts} >= {0, 4} and len({pair[0] for pair in counts}) == VISIBLE + 1


def test_every_token_is_visible_about_as_often():
    store, seen = PairedStore(), np.zeros((2, 4, 2, 3))
    for number in range(600):
        seen += [~view.mask for view in visit(store).sample(store, 0, sample_rng(3, number)).values()]
    assert np.abs(seen / 600 - VISIBLE / 48).max() < 0.08


def test_crops_of_all_modalities_show_the_same_place_of_the_world():
    store = Offset()
    for number, case in enumerate((0, 1, 2, 3, 0, 1)):
        views = visit(store).sample(store, case, sample_rng(4, number))
        own, other = (("CT", "MR"), ("MR", "CT"))[case % 2]
        assert views[own].case is None and views[other].case == case + (-1 if case % 2 else 1)
        corners = [to_case(views[name].affine, np.array([(0, 0, 0), (15, 7, 11)])) for name in ("CT", "MR")]
        assert np.array_equal(corners[0] - (2, 3, 1), corners[1])
        for name, held in (("CT", case - case % 2), ("MR", case - case % 2 + 1)):
            places = to_case(views[name].affine, np.stack(np.indices(SIZE), -1)).astype(int)
            inside = ((places >= 0) & (places < TINY_SHAPE)).all(-1)
            assert np.array_equal(views[name].image[0][inside], store.arrays[held][0][tuple(places[inside].T)])
            assert inside.mean() >= 0.5 and (views[name].image[0][~inside] == np.float32(store.fill(held)[0])).all()


def test_a_missing_modality_is_background_all_hidden_and_read_from_a_case_that_does_not_show_it():
    store = Offset()
    for case in (6, 7):
        for number in range(5):
            views = visit(store).sample(store, case, sample_rng(5, number))
            assert views["MR"].mask.all() and views["MR"].case is None and (views["MR"].image == store.fill(case)[0]).all()
            assert int((~views["CT"].mask).sum()) == VISIBLE and views["CT"].case is None


def test_an_image_that_shows_less_than_half_of_the_crop_counts_as_missing():
    store = Offset()
    store.far = 30.0  # ten of 22 voxels: most of the image overlaps, but not every crop
    found = Counter()
    for number in range(40):
        views = visit(store, Crop((8, 8, 8), NONE, body=0.0), visible=3).sample(store, 0, sample_rng(6, number))
        start = int(views["CT"].affine[2, 3])
        found[views["MR"].case is None] += 1
        assert (views["MR"].case is None) == (start - 10 + 4 < 0)
        assert views["MR"].mask.all() or views["MR"].case is not None
    assert min(found[True], found[False]) > 5


def test_channels_of_one_case_are_views_of_their_own():
    store = ArrayStore(2, TINY_SHAPE, channels=3)
    views = visit(store, modalities=("MR", "CT", "PET")).sample(store, 1, sample_rng(7, 0))
    assert all(view.image.shape == (1, *SIZE) and view.case is None for view in views.values())
    whole = Crop(SIZE, body=0.0).sample(store, 1, sample_rng(7, 0))["image"].image
    assert all(np.array_equal(views[name].image[0], whole[channel]) for channel, name in enumerate(("CT", "MR", "PET")))


def test_two_ranks_see_the_samples_that_one_would_see():
    def batch(count, rank, ranks):
        store = PairedStore()
        return StepDataset(store, visit(store), range(8), 3, count, rank=rank, ranks=ranks)[5]

    whole, halves = batch(2, 0, 1), [batch(1, rank, 2) for rank in range(2)]
    for name, view in whole.items():
        assert view.cases == halves[0][name].cases + halves[1][name].cases
        assert all(np.array_equal(getattr(view, part)[i], getattr(halves[i][name], part)[0]) for i in range(2) for part in ("image", "mask"))
