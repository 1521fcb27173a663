"""Images of one visit and follow-up scans: who belongs together, and where the same place is."""

from types import SimpleNamespace

import numpy as np
import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.data.sessions import Image, Sessions, affine_between, overlap, read_sessions
from nnssl_ext.data.spatial import is_slicing, make_affine, rotation_matrix, to_case
from nnssl_ext.data.views import read_crops
from tests.make_data import ArrayStore

SHAPE, SIZE = (20, 24, 28), (8, 6, 10)
HERE, BESIDE = Geometry(SHAPE, (3.0, 2.0, 1.0)), Geometry(SHAPE, (3.0, 2.0, 1.0), origin=(500.0, 0.0, 0.0))
TILTED = tuple(rotation_matrix(np.array([20.0, -10.0, 5.0])).ravel())


def collection(*rows):
    """Rows of (subject, session, modalities with spaces between them[, geometry])."""
    geometries = tuple(row[3] if len(row) > 3 else HERE for row in rows)
    subjects, sessions = (tuple(row[column] for row in rows) for column in (0, 1))
    return Sessions(tuple(f"case{i}" for i in range(len(rows))), subjects, sessions, tuple(tuple(row[2].split()) for row in rows), geometries)


VISITS = collection(
    ("a", "1", "CT"), ("a", "1", "MR"), ("a", "1", "MR"), ("a", "2", "CT"), ("b", "1", "MR"), ("b", "1", "PET", BESIDE), ("c", "1", "CT"), ("a", "1", "CT")
)


def test_images_of_a_visit_are_found_by_modality_and_a_case_stands_for_its_own():
    assert VISITS.images(0) == {"CT": [Image(0, 0)], "MR": [Image(1, 0), Image(2, 0)]}
    assert VISITS.images(7) == {"CT": [Image(7, 0)], "MR": [Image(1, 0), Image(2, 0)]}
    assert VISITS.images(2) == {"MR": [Image(2, 0)], "CT": [Image(0, 0), Image(7, 0)]}
    assert VISITS.images(3) == {"CT": [Image(3, 0)]} and VISITS.images(6) == {"CT": [Image(6, 0)]}


def test_images_that_lie_elsewhere_are_not_registered():
    assert VISITS.images(4) == {"MR": [Image(4, 0)]}


def test_channels_of_a_case_are_its_modalities():
    assert collection(("a", "1", "T1 T2")).images(0) == {"T1": [Image(0, 0)], "T2": [Image(0, 1)]}
    mixed = collection(("a", "1", "T1 T2"), ("a", "1", "CT T2"))
    assert mixed.images(0) == {"T1": [Image(0, 0)], "T2": [Image(0, 1)], "CT": [Image(1, 0)]}


def test_follow_ups_are_of_the_same_subject_and_modality_and_of_another_session():
    assert [VISITS.follow_ups(case) for case in range(8)] == [[3], [], [], [0, 7], [], [], [], [3]]
    assert collection(("a", "1", "CT"), ("a", "2", "CT", BESIDE)).follow_ups(0) == []


@pytest.mark.parametrize(
    ("rows", "check", "told"),
    [
        (
            [("a", "1", "CT"), ("b", "1", "MR"), ("b", "2", "CT")],
            "check_pairs",
            r"of one visit; none of 3 visits has them \(first: case0 \(CT\) and case1 \(MR\)",
        ),
        ([("a", "1", "CT"), ("b", "1", "MR"), ("b", "1", "CT", BESIDE)], "check_pairs", r"case1 \(MR\) and case2 \(CT\) share 0% of their extent"),
        ([("a", "1", "CT"), ("a", "1", "CT"), ("a", "2", "MR")], "check_follow_ups", r"none of 1 subjects has two \(first: case0"),
        ([("a", "1", "CT"), ("a", "2", "CT", BESIDE)], "check_follow_ups", r"case0 \(CT\) and case1 \(CT\) share 0% of their extent"),
    ],
)
def test_a_collection_without_pairs_or_follow_ups_is_refused_with_names(rows, check, told):
    with pytest.raises(UserError, match=f"SomeTrainer needs .*{told}") as error:
        getattr(collection(*rows), check)("SomeTrainer", "Dataset801_Test")
    assert len(str(error.value).splitlines()) == 3 and "Dataset801_Test" in str(error.value)


def test_a_collection_with_one_pair_or_one_follow_up_is_accepted():
    VISITS.check_pairs("SomeTrainer", "Dataset801_Test")
    VISITS.check_follow_ups("SomeTrainer", "Dataset801_Test")
    collection(("a", "1", "T1 T2")).check_pairs("SomeTrainer", "Dataset801_Test")


@pytest.mark.parametrize(("shift", "share"), [(0.0, 1.0), (14.0, 0.5), (-21.0, 0.25), (28.0, 0.0)])
def test_overlap_is_the_share_of_the_smaller_extent(shift, share):
    moved = Geometry(SHAPE, HERE.spacing, origin=(shift, 0.0, 0.0))
    assert overlap(HERE, moved) == overlap(moved, HERE) == share
    assert overlap(HERE, Geometry((60, 60, 60), (3.0, 2.0, 3.0), origin=(-60.0, -30.0, -60.0))) == 1.0  # inside a large one
    turned = Geometry(SHAPE, HERE.spacing, direction=(-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0), origin=(27.0, 0.0, 0.0))
    assert overlap(HERE, turned) == 1.0  # the same box, read from the other side


@pytest.mark.parametrize("target", [BESIDE, Geometry((9, 9, 9), (1.5, 4.0, 2.0), (-3.0, 7.0, 11.0), TILTED)], ids=["moved", "tilted"])
def test_the_same_place_of_the_world_is_found_in_any_geometry(target):
    source = Geometry(SHAPE, (3.0, 2.0, 1.0), (5.0, -4.0, 3.0), tuple(rotation_matrix(np.array([0.0, 30.0, 0.0])).ravel()))
    affine = make_affine((9.5, 11.0, 12.5), SIZE, source.spacing, rotation_matrix(np.array([5.0, 0.0, 8.0])), np.full(3, 1.1), np.array([True, False, False]))
    found = affine_between(affine, SIZE, source, target)
    for voxel in ((0, 0, 0), (7, 5, 9), (3, 1, 8)):
        assert np.allclose(target.to_world(to_case(found, np.array(voxel))), source.to_world(to_case(affine, np.array(voxel))), atol=1e-9)


@pytest.mark.parametrize("rounding", [0.0, 1e-4])
def test_grids_that_agree_give_slices_bit_for_bit(rounding):
    store = ArrayStore(1, SHAPE)
    origin = tuple(0.1 + rounding + step * n for step, n in zip((1.0, 2.0, 3.0), (5, -2, 3)))  # (x, y, z)
    target = Geometry((15, 26, 20), (3.0, 2.0, 1.0), origin)
    source = Geometry(SHAPE, (3.0, 2.0, 1.0), (0.1, 0.1, 0.1))
    affine = make_affine((9.5, 10.5, 14.5), SIZE, source.spacing, np.eye(3), np.ones(3), np.array([True, False, False]))
    found = affine_between(affine, SIZE, source, target)
    assert is_slicing(affine) and is_slicing(found) and np.array_equal(found[:, 3] - affine[:, 3], (-3, 2, -5))
    crop = SimpleNamespace(
        shape=lambda case: target.shape,
        read=lambda case, box: np.pad(store.arrays[0], ((0, 0), (0, 9), (2, 9), (0, 9)))[
            (slice(None), *(slice(low + shift, high + shift) for (low, high), shift in zip(box, (3, 0, 5))))
        ],
    )
    assert np.array_equal(read_crops(crop, 0, [found], [SIZE])[0], read_crops(store, 0, [affine], [SIZE])[0])


def test_grids_that_are_apart_by_half_a_voxel_are_interpolated():
    affine = make_affine((9.5, 10.5, 14.5), SIZE, HERE.spacing, np.eye(3), np.ones(3), np.zeros(3, bool))
    found = affine_between(affine, SIZE, HERE, Geometry(SHAPE, HERE.spacing, (0.5, 0.0, 0.0)))
    assert not is_slicing(found) and np.allclose(found[:, 3] - affine[:, 3], (0, 0, -0.5))


def test_a_store_is_read_once_case_by_case():
    read = []

    class Store(ArrayStore):
        def info(self, case):
            read.append(case)
            return {"session": case // 2, "modalities": ["CT" if case % 2 else "MR"], "stored": HERE.as_dict()}

        def subject(self, case):
            return "a"

    found = read_sessions(Store(4, SHAPE))
    assert read == [0, 1, 2, 3] and found.images(1) == {"CT": [Image(1, 0)], "MR": [Image(0, 0)]} and found.follow_ups(3) == [1]
    assert found.geometries[2] == HERE
