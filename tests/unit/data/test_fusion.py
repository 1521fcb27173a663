"""Pairs of subjects and random boxes of classes."""

import hashlib

import numpy as np
import pytest

from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data import fusion
from nnssl_ext.data.fusion import FusionPair, random_classes
from nnssl_ext.data.loader import StepDataset, batches
from nnssl_ext.data.partners import Partners
from nnssl_ext.data.views import Crop
from tests.make_data import TINY_SHAPE, ArrayStore

SUBJECTS = ("a", "a", "b", "c", "c", "c", "d", "e")
SPEC = FusionPair(Crop((16, 16, 16)), Partners(SUBJECTS, (0, 1, 2, 3, 4, 5)), 5)


class Scripted:
    """A generator that gives what it is told."""

    def __init__(self, *values) -> None:
        self.values = list(values)

    def integers(self, low, high=None, size=None):
        return np.array(self.values.pop(0))


def test_later_boxes_win_and_no_box_is_class_zero():
    edges, starts = [[8, 8, 8], [4, 8, 6]], [[0, 0, 0], [2, 4, 4]]
    label = random_classes((12, 16, 20), 5, Scripted(2, edges, starts, [3, 1]))
    expected = np.zeros((12, 16, 20), np.float32)
    expected[:8, :8, :8] = 3
    expected[2:6, 4:12, 4:10] = 1
    assert label.dtype == np.float32 and np.array_equal(label, expected)
    swapped = random_classes((12, 16, 20), 5, Scripted(2, edges[::-1], starts[::-1], [1, 3]))
    assert swapped[3, 5, 5] == 3 and label[3, 5, 5] == 1


@pytest.mark.parametrize("size", [(16, 16, 16), (64, 96, 40), (2, 40, 9), (1, 1, 1)])
def test_boxes_lie_inside_the_crop_and_their_edges_span_eight_voxels_to_five_eighths(size):
    class Recording:
        def __init__(self, rng) -> None:
            self.rng, self.drawn = rng, []

        def integers(self, *arguments):
            self.drawn.append(self.rng.integers(*arguments))
            return self.drawn[-1]

    counts, lengths = [], []
    for number in range(60):
        rng = Recording(sample_rng(0, number))
        label = random_classes(size, 5, rng)
        count, edges, starts, classes = rng.drawn
        assert label.shape == size and len(edges) == len(classes) == count
        assert bool((starts >= 0).all()) and bool((starts + edges <= size).all()) and set(classes) <= {1, 2, 3, 4}
        counts.append(int(count))
        lengths += edges.tolist()
    longest = [max(1, int(0.625 * n)) for n in size]
    assert min(counts) < 13 and max(counts) > 36 and min(counts) >= 10 and max(counts) <= 39
    assert np.array(lengths).min(0).tolist() == [min(8, n) for n in longest] and np.array(lengths).max(0).tolist() == longest


def test_all_classes_occur_about_equally_often_but_for_the_background():
    shares = np.mean([[np.mean(random_classes((96, 96, 96), 5, sample_rng(1, n)) == k) for k in range(5)] for n in range(60)], 0)
    assert shares.sum() == pytest.approx(1) and 0.3 < shares[0] < 0.6
    assert np.abs(shares[1:] - shares[1:].mean()).max() < 0.04


def test_the_background_is_of_another_subject_among_the_partners_and_every_one_of_these_occurs():
    store = ArrayStore(8, TINY_SHAPE)
    for case in range(8):
        found = {SPEC.sample(store, case, sample_rng(2, n))["background"].case for n in range(40)}
        assert found == {other for other in range(6) if SUBJECTS[other] != SUBJECTS[case]}


def test_both_crops_come_from_where_they_say():
    store = ArrayStore(8, TINY_SHAPE)
    views = SPEC.sample(store, 7, sample_rng(3, 0))
    assert list(views) == ["foreground", "background", "label"] and views["foreground"].case is None
    for view, case in ((views["foreground"], 7), (views["background"], views["background"].case)):
        places = np.einsum("ij,jzyx->izyx", view.affine[:, :3], np.indices((16, 16, 16)).astype(float)) + view.affine[:, 3].reshape(3, 1, 1, 1)
        assert np.array_equal(view.image, store.arrays[case][(slice(None), *places.round().astype(int))])
    assert views["label"].image.shape == (1, 16, 16, 16) and views["foreground"].image.shape == (1, 16, 16, 16)


def digest(batch):
    return {name: (hashlib.sha256(view.image.numpy().tobytes()).hexdigest(), view.cases) for name, view in batch.items()}


def data(batch_size, rank=0, ranks=1, store=None):
    return StepDataset(store or ArrayStore(8, TINY_SHAPE), SPEC, [0, 1, 2, 3], 3, batch_size, rank=rank, ranks=ranks)


def test_batches_are_a_function_of_seed_and_step_for_any_number_of_workers():
    assert [digest(batch) for batch in batches(data(2), 0, 4, 2)] == [digest(batch) for batch in batches(data(2), 0, 4)]


def test_two_ranks_see_the_pairs_that_one_would_see_and_a_batch_says_of_which_case_each_crop_is():
    whole, halves = data(2)[5], [data(1, rank, 2)[5] for rank in range(2)]
    for name, view in whole.items():
        assert view.cases == halves[0][name].cases + halves[1][name].cases
        assert all(np.array_equal(view.image[i], halves[i][name].image[0]) for i in range(2))
    assert all(SUBJECTS[a] != SUBJECTS[b] for a, b in zip(whole["foreground"].cases, whole["background"].cases))


def test_a_background_is_compared_with_its_recorded_hash_as_any_other_case():
    class Checked(ArrayStore):
        verified = ()

        def verify(self, case):
            self.verified += (case,)

    store = Checked(8, TINY_SHAPE)
    batch = data(2, store=store)[0]
    assert set(store.verified) == {*batch["foreground"].cases, *batch["background"].cases}
    assert len(store.verified) == len(set(store.verified)) and fusion.BOXES == (10, 39)
