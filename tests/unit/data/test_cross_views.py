"""Second views: of which case, from which place, and how that place is told."""

from dataclasses import replace

import numpy as np
import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.cross_views import COLOUR, CounterpartPair, HiddenFirst, OtherSubjects, other_modalities, other_sessions
from nnssl_ext.data.iou_pairs import IoUPair
from nnssl_ext.data.partners import Partners
from nnssl_ext.data.spatial import MIRROR, NONE, to_case
from nnssl_ext.data.switches import without
from nnssl_ext.data.views import Crop
from tests.make_data import ArrayStore

SIZE, TOKEN, SHAPE, SPACING = (4, 12, 8), (2, 4, 4), (10, 24, 16), (4.0, 1.0, 2.0)


class Visits(ArrayStore):
    """Two subjects with two visits in CT and MR each, one with a single CT; the value of a voxel is a function of where it is in the world."""

    def __init__(self, channels=1, shift=(0, 0, 0)):
        super().__init__(9, SHAPE, channels, SPACING)
        kinds = [(subject, session, modality) for subject in "ab" for session in "12" for modality in ("CT", "MR")] + [("c", "1", "CT")]
        self.kinds = kinds if channels == 1 else [(str(case), "1", "CT,MR") for case in range(9)]
        for case in range(9):
            start = (0, 0, 0) if case % 2 == 0 else shift  # voxels that every other case begins later
            voxels = np.stack(np.meshgrid(*(np.arange(n) + s for n, s in zip(SHAPE, start)), indexing="ij"))
            self.arrays[case] = np.repeat(
                (voxels * np.array(SPACING)[:, None, None, None] * [[[[1]]], [[[100]]], [[[10000]]]]).sum(0)[None], channels, 0
            ).astype(np.float32)
        self.geometries = [Geometry(SHAPE, SPACING).cropped(tuple((s, s + n) for s, n in zip(shift if case % 2 else (0, 0, 0), SHAPE))) for case in range(9)]

    def subject(self, case):
        return self.kinds[case][0]

    def geometry(self, case):
        return self.geometries[case]

    def info(self, case):
        return {"session": self.kinds[case][1], "modalities": self.kinds[case][2].split(","), "stored": self.geometries[case].as_dict()}


def pair(counterparts, spatial=MIRROR):
    return CounterpartPair(Crop(SIZE, spatial, COLOUR), counterparts, alone=IoUPair(SIZE, (0.3, 0.6)))


def drawn(counterparts, case, number=200):
    return {counterparts.draw(case, sample_rng(0, i)) for i in range(number)}


def test_sessions_are_others_of_the_same_subject_in_the_same_modality_and_modalities_are_others_of_the_same_visit():
    store = Visits()
    sessions, modalities = other_sessions(store, "CroCo", "data"), other_modalities(store, "CroCo", "data")
    assert [drawn(sessions, case, 20) for case in range(9)] == [{2}, {3}, {0}, {1}, {6}, {7}, {4}, {5}, {None}]
    assert [drawn(modalities, case, 20) for case in range(9)] == [{1}, {0}, {3}, {2}, {5}, {4}, {7}, {6}, {None}]


@pytest.mark.parametrize("spatial", [NONE, MIRROR], ids=["plain", "mirrored"])
def test_both_views_show_the_same_place_of_the_world_where_their_cases_begin_elsewhere(spatial):
    store = Visits(shift=(1, -2, 3))
    spec, inner = pair(other_modalities(store, "CroCo", "data"), spatial), 0
    for number in range(20):
        views = spec.sample(store, 0, sample_rng(0, number))
        one, other = views["first"], views["second"]
        assert other.case == 1
        assert np.array_equal(to_case(one.affine, np.zeros(3)) - (1, -2, 3), to_case(other.affine, np.zeros(3)))
        z, y, x = np.meshgrid(*map(np.arange, SIZE), indexing="ij")
        places = to_case(other.affine, np.stack((z, y, x), -1))
        within = ((places >= 0) & (places <= np.array(SHAPE) - 1)).all(-1)
        assert within.mean() >= 0.4
        assert np.array_equal(one.image[0][within], other.image[0][within])  # values are coordinates of the world
        inner += within.all()
    assert inner


@pytest.mark.parametrize("kind", ["world", "shares"])
def test_the_way_back_leads_from_the_second_view_to_what_the_first_one_shows(kind):
    store = Visits(shift=(1, -2, 3))
    counterparts = other_modalities(store, "CroCo", "data") if kind == "world" else OtherSubjects(Partners(tuple("abcdefghi"), tuple(range(9))))
    if kind == "shares":
        store.arrays[1] = np.repeat(store.arrays[1], 2, axis=2)
    carry = counterparts.carry(store, 0, 1)
    corners = np.array([(-0.5, -0.5, -0.5), np.array(store.shape(1)) - 0.5])
    expected = corners + (1, -2, 3) if kind == "world" else np.array([(-0.5, -0.5, -0.5), np.array(store.shape(0)) - 0.5])
    assert np.allclose(to_case(carry, corners), expected)


def test_another_subject_is_shown_at_about_the_same_share_of_the_way():
    store = Visits()
    counterparts = OtherSubjects(Partners(tuple(store.subject(case) for case in range(9)), tuple(range(9))))
    assert drawn(counterparts, 0) == {4, 5, 6, 7, 8}
    views = pair(counterparts).sample(store, 0, sample_rng(0, 1))
    assert np.array_equal(views["first"].affine, views["second"].affine) and store.subject(views["second"].case) != "a"


def test_a_case_without_counterpart_is_shown_beside_itself():
    store = Visits()
    spec = pair(other_sessions(store, "CroCo", "data"))
    views, expected = (s.sample(store, 8, sample_rng(0, 3)) for s in (spec, spec.alone))
    assert all(np.array_equal(views[name].image, expected[name].image) and views[name].case is None for name in ("first", "second"))


def test_collections_without_counterparts_are_refused_with_the_reason():
    store = Visits()
    store.kinds = [(str(case), "1", "CT") for case in range(9)]
    for find, reason in ((other_sessions, "sessions"), (other_modalities, "two modalities")):
        with pytest.raises(UserError, match=reason) as error:
            find(store, "CroCo", "data")
        assert len(str(error.value).splitlines()) <= 3
    with pytest.raises(UserError, match="channels of one case"):
        other_modalities(Visits(channels=2), "CroCo", "data")


def test_exactly_the_share_of_the_first_views_tokens_is_hidden_and_nothing_of_the_second():
    store, plain = Visits(), IoUPair(SIZE, (0.3, 0.6))
    masks = set()
    for number in range(10):
        views, unmasked = (spec.sample(store, 0, sample_rng(0, number)) for spec in (HiddenFirst(plain, TOKEN, 0.9), plain))
        assert views["first"].mask.shape == (2, 3, 2) and views["first"].mask.sum() == 11 and views["second"].mask is None
        assert all(np.array_equal(views[name].image, unmasked[name].image) for name in views)
        masks.add(views["first"].mask.tobytes())
    assert len(masks) > 5


def test_augmentations_of_both_views_can_be_left_out_and_both_are_drawn_by_themselves():
    store = Visits()
    spec = HiddenFirst(pair(other_sessions(store, "CroCo", "data")), TOKEN, 0.9)
    views = [spec.sample(store, 0, sample_rng(0, number)) for number in range(10)]
    assert any(v["first"].intensity != v["second"].intensity for v in views)
    plain = without(replace(spec, pair=replace(spec.pair, alone=spec.pair)), ("brightness", "contrast", "gamma", "mirror"))
    for number in range(10):
        views = plain.sample(store, 0, sample_rng(0, number))
        assert not views["first"].intensity and not views["second"].intensity
        assert np.array_equal(views["first"].affine[:, :3], np.eye(3))
