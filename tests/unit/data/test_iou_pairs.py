"""Pairs of crops with a given IoU: all of them, each as often as any other, and nothing else."""

from fractions import Fraction
from itertools import product
from math import prod

import numpy as np
import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.iou_pairs import IoUPair, pairs_within, random_pair
from nnssl_ext.data.sampling import body_share, iou, whole
from nnssl_ext.data.spatial import MIRROR, NONE, Spatial, bounds
from nnssl_ext.data.turned import Turning
from tests.make_data import ArrayStore

CASES = [  # volume, crops, interval
    ((12,), (4,), (5,), (0.3, 0.6)),
    ((9, 8), (4, 4), (4, 4), (0.3, 0.6)),
    ((9, 8), (4, 3), (2, 5), (0.1, 0.6)),
    ((6, 5), (3, 3), (3, 3), (0, 0)),
    ((6, 5), (3, 3), (3, 3), (1, 1)),
    ((6, 5, 5), (3, 3, 3), (3, 3, 3), (0.3, 0.6)),
    ((6, 5, 5), (3, 3, 3), (2, 4, 3), (0.2, 0.9)),
    ((5, 3, 6), (3, 4, 3), (3, 5, 3), (0, 1)),  # an axis shorter than the crops
]
CORNERS = [  # crops that share nothing, all, little but something, whatever comes; in slices and in volumes
    (*sizes, interval)
    for sizes in (((3, 7, 6), (1, 4, 3), (1, 4, 3)), ((5, 6, 5), (3, 3, 3), (3, 3, 3)))
    for interval in ((0.0, 0.0), (1.0, 1.0), (0.0001, 0.3), (0.0, 1.0))
]
LARGE = ((0, 300),) * 3, (96,) * 3, (96,) * 3


def shared(first, second):
    return prod(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a, b in zip(first, second))


def enumerated(lengths, first, second, interval):
    """Starts of all pairs, one position after the other, each compared as a fraction; of slices those of one slice."""
    low, high = (Fraction(str(edge)) for edge in interval)
    places = [product(*(range(n - s + 1) if n >= s else [(n - s) // 2] for n, s in zip(lengths, size))) for size in (first, second)]
    found = []
    for a, b in product(*map(list, places)):
        common = shared([(p, p + n) for p, n in zip(a, first)], [(p, p + n) for p, n in zip(b, second)])
        together = all(p == q for p, q, m, n in zip(a, b, first, second) if m == n == 1)
        if together and low <= Fraction(common, prod(first) + prod(second) - common) <= high:
            found.append((a, b))
    return found


def starts(boxes):
    return tuple(tuple(low for low, _ in box) for box in boxes)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("lengths, first, second, interval", [*CASES, *CORNERS], ids=str)
def test_the_numbered_pairs_are_those_of_a_plain_enumeration_each_once(lengths, first, second, interval, parts):
    numbered = [tuple(map(tuple, group.pair(n))) for group in pairs_within(lengths, first, second, interval, parts) for n in range(group.count)]
    expected = enumerated(lengths, first, second, interval)
    assert expected and len(numbered) == len(expected) and set(numbered) == set(expected)


@pytest.mark.parametrize("lengths, first, second, interval", [CASES[1], CASES[2], CASES[5], CASES[6], *CORNERS], ids=str)
def test_every_pair_is_drawn_equally_often(lengths, first, second, interval):
    every = enumerated(lengths, first, second, interval)
    counts, rng, expected = dict.fromkeys(every, 0), np.random.default_rng(0), min(20, 10_000 / len(every))
    for _ in range(round(expected * len(every))):
        counts[starts(random_pair(whole(lengths), first, second, interval, rng))] += 1
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    freedom = len(every) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5  # mean and variance of the distribution


def test_a_hundred_thousand_pairs_lie_in_the_interval_and_their_mean_is_that_of_all_pairs():
    (group,) = pairs_within((300,) * 3, *LARGE[1:], (0.3, 0.6))
    found = np.array([group.pair(int(n)) for n in np.random.default_rng(0).integers(group.count, size=100_000)])
    assert found.min() >= 0 and (found + 96).max() <= 300
    common = np.maximum(0, 96 - np.abs(found[:, 0] - found[:, 1])).prod(1)
    assert (10 * common >= 3 * (2 * 96**3 - common)).all() and (10 * common <= 6 * (2 * 96**3 - common)).all()
    assert abs((common / (2 * 96**3 - common)).mean() - 0.40) < 0.005


def test_an_iou_of_exactly_six_tenths_lies_in_the_interval():
    (group,) = pairs_within((8,), (4,), (4,), (0.6, 0.6))  # 3 voxels of 5
    assert group.count == 8 and all(abs(a[0] - b[0]) == 1 for a, b in map(group.pair, range(8)))


@pytest.mark.parametrize("interval", [(0.6, 1.0), (0.9, 1.0), (0.0, 0.01)], ids=str)
def test_rare_pairs_are_drawn_at_once(interval):
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert interval[0] <= iou(*random_pair(*LARGE, interval, rng)) <= interval[1]


def test_with_parts_the_iou_is_uniform():
    rng, values = np.random.default_rng(0), []
    groups = pairs_within((300,) * 3, *LARGE[1:], (0.3, 0.6), 10)
    for number, group in enumerate(groups):
        values += [iou(*([(p, p + 96) for p in box] for box in group.pair(int(n)))) for n in rng.integers(group.count, size=20)]
        assert all(0.3 + 0.03 * number - 1e-9 <= value <= 0.33 + 0.03 * number + 1e-9 for value in values[-20:])
    assert len(groups) == 10 and abs(np.mean(values) - 0.45) < 0.005
    drawn = [iou(*random_pair(*LARGE, (0.3, 0.6), rng, parts=10)) for _ in range(400)]
    assert abs(np.mean(drawn) - 0.45) < 4 * 0.0866 / 20


def test_no_such_pair_and_too_many_pairs_are_told_in_a_sentence():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="no crops of 8x8x8 and 8x8x8 voxels have an IoU from 0.3 to 0.6") as error:
        random_pair(((0, 8),) * 3, (8,) * 3, (8,) * 3, (0.3, 0.6), rng)
    assert len(str(error.value).splitlines()) <= 3
    with pytest.raises(UserError, match="2\\^63"):
        random_pair(((0, 2000),) * 3, (8,) * 3, (8,) * 3, (0.3, 0.6), rng)


def test_both_crops_hold_enough_body_where_a_pair_does_and_the_iou_is_kept_where_none_does():
    body, rng = np.zeros((5, 5, 5), bool), np.random.default_rng(0)
    body[:, :, 3:] = True
    for _ in range(30):
        boxes = random_pair(whole((40, 40, 40)), (16,) * 3, (16,) * 3, (0.3, 0.6), rng, body=body, minimum=0.5)
        assert min(body_share(body, box) for box in boxes) >= 0.5 and 0.3 <= iou(*boxes) <= 0.6
    empty = random_pair(whole((40, 40, 40)), (16,) * 3, (16,) * 3, (0.3, 0.6), rng, body=np.zeros_like(body), minimum=0.5)
    assert 0.3 <= iou(*empty) <= 0.6


# Views


@pytest.mark.parametrize("shape", [(40, 48, 44), (16, 48, 20), (16, 16, 16), (10, 12, 30)], ids=str)
def test_views_have_the_iou_also_in_cases_no_larger_than_the_crop(shape):
    store, spec = ArrayStore(1, shape), IoUPair((16, 16, 16))
    for number in range(20):
        views = spec.sample(store, 0, sample_rng(0, number))
        boxes = [bounds(view.affine, (16, 16, 16)) for view in views.values()]
        assert list(views) == ["first", "second"] and all(view.image.shape == (1, 16, 16, 16) for view in views.values())
        assert 0.3 <= iou(*boxes) <= 0.6
        if shape == (40, 48, 44):
            assert all(0 <= low and high <= n for box in boxes for (low, high), n in zip(box, shape))


def test_a_case_that_is_large_enough_is_not_padded_along_any_axis():
    store, spec = ArrayStore(1, (16, 48, 20)), IoUPair((16, 16, 16))
    for number in range(20):
        views = spec.sample(store, 0, sample_rng(0, number))
        assert all(low >= 0 and high <= n for view in views.values() for (low, high), n in zip(bounds(view.affine, (16,) * 3), (16, 48, 20)))


@pytest.mark.parametrize("interval", [(0.0, 0.0), (1.0, 1.0), (0.0001, 0.3), (0.0, 1.0), (0.3, 0.6)], ids=str)
@pytest.mark.parametrize("patch", [(1, 16, 16), (1, 16, 9), (16, 16, 16)], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 40, 44), (4, 40, 44), (20, 20, 20)], ids=str)
def test_slices_and_volumes_have_pairs_that_share_nothing_all_or_little(shape, patch, interval):
    store, spec, found = ArrayStore(1, shape), IoUPair(patch, interval), set()
    for number in range(20):
        boxes = [bounds(view.affine, patch) for view in spec.sample(store, 0, sample_rng(0, number)).values()]
        found.add(iou(*boxes))
        assert patch[0] > 1 or (boxes[0][0] == boxes[1][0] and 0 <= boxes[0][0][0] < shape[0])  # one slice, never one that there isn't
    assert interval[0] <= min(found) and max(found) <= interval[1]
    assert len(found) > 1 or interval[0] == interval[1] or shape == (1, 16, 16)


def mirrored(view):
    return tuple(np.diag(view.affine[:, :3]) < 0)


def test_both_crops_are_mirrored_alike_or_each_by_itself():
    store = ArrayStore(1, (40, 48, 44))
    alike, apart = ([spec.sample(store, 0, sample_rng(0, n)) for n in range(40)] for spec in (IoUPair((16,) * 3), IoUPair((16,) * 3, apart=True)))
    assert all(mirrored(views["first"]) == mirrored(views["second"]) for views in alike) and len({mirrored(views["first"]) for views in alike}) == 8
    assert len({(mirrored(views["first"]), mirrored(views["second"])) for views in apart}) > 16


def test_quarter_turns_rotation_and_size_are_those_that_are_given():
    store = ArrayStore(1, (40, 48, 44))
    spec = IoUPair((8, 16, 24), spatial=NONE, turning=Turning((8, 16, 16), (1, 2), (0, 1, 2, 3)))
    seen = set()
    for number in range(60):
        views = spec.sample(store, 0, sample_rng(0, number))
        assert all(view.image.shape == (1, 8, 16, 16) for view in views.values())
        seen |= {tuple(tuple(view.affine[:, :3].round().astype(int).ravel()) for view in views.values())}
    assert len(seen) == 16  # four turns of each
    turned = IoUPair((16,) * 3, spatial=Spatial(rotation=(10.0, 10.0, 10.0), p_rotation=1.0, mirror=MIRROR.mirror)).sample(store, 0, sample_rng(0, 0))
    assert not np.array_equal(np.abs(turned["first"].affine[:, :3]), np.eye(3))
