"""Step-indexed batches."""

import hashlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnssl_ext.data import augment
from nnssl_ext.data.loader import StepDataset, batches, split_subjects, subject_numbers
from nnssl_ext.data.masking import MaskedCrop, MaskedMultiCrop
from nnssl_ext.data.spatial import NNUNET
from nnssl_ext.data.views import Crop, MultiCrop
from tests.make_data import ArrayStore

SPEC = MaskedCrop(Crop((16, 16, 16)), (8, 8, 8), 0.75)
AUGMENTED = MaskedCrop(Crop((16, 16, 16), replace(NNUNET, p_rotation=0.6, p_zoom=0.6), augment.NNUNET), (8, 8, 8), 0.75)
MASKED = MaskedMultiCrop(MultiCrop((16, 12, 16), (8, 8, 8), 2, intensity=augment.NNUNET), (4, 4, 4))


def digest(batch) -> str:
    content = b""
    for name, view in sorted(batch.items()):
        parts = (view.image, view.affine) if view.mask is None else (view.image, view.affine, view.mask, view.hidden)
        content += name.encode() + b"".join(part.numpy().tobytes() for part in parts) + repr(view.cases).encode()
    return hashlib.sha256(content).hexdigest()


def dataset(batch_size=4, rank=0, ranks=1, cases=range(8), spec=SPEC) -> StepDataset:
    return StepDataset(ArrayStore(), spec, list(cases), 3, batch_size, rank=rank, ranks=ranks)


@pytest.mark.parametrize("spec", [SPEC, AUGMENTED, MASKED])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_batches_are_identical_with_any_number_of_workers(workers, spec):
    assert [digest(b) for b in batches(dataset(spec=spec), 0, 9, workers)] == [digest(b) for b in batches(dataset(spec=spec), 0, 9, 0)]


def test_starting_at_a_step_gives_the_batches_of_an_uninterrupted_run():
    assert [digest(b) for b in batches(dataset(), 5, 9)] == [digest(b) for b in batches(dataset(), 0, 9)][5:]


@pytest.mark.parametrize("spec", [SPEC, AUGMENTED, MASKED])
def test_one_rank_and_two_ranks_see_the_same_samples(spec):
    def samples(parts):
        """Every view of every sample, in the order of the samples."""
        found = []
        for k in range(6):
            for batch in [part[k] for part in parts]:
                size = len(next(iter(batch.values())).image)
                found += [
                    [hashlib.sha256(part[i].numpy().tobytes()).digest() for v in batch.values() for part in (v.image, v.mask) if part is not None]
                    for i in range(size)
                ]
        return found

    whole, halves = samples([dataset(4, spec=spec)]), samples([dataset(2, rank, 2, spec=spec) for rank in range(2)])
    assert whole == halves and len(whole) == 24


@pytest.mark.parametrize(("batch_size", "ranks"), [(1, 1), (3, 1), (2, 2), (1, 4)])
def test_half_of_the_global_crops_of_all_ranks_are_masked_and_their_hidden_cells_are_listed(batch_size, ranks):
    masked = 0
    for rank in range(ranks):
        batch = dataset(batch_size, rank, ranks, spec=MASKED)[5]
        for name, view in batch.items():
            if name.startswith("local"):
                assert view.mask is None and view.hidden is None
            else:
                assert view.hidden.dtype == torch.int64 and torch.equal(view.hidden, view.mask.flatten().nonzero()[:, 0])
                masked += int(view.mask.flatten(1).any(1).sum())
    assert masked == batch_size * ranks


def test_masks_differ_from_step_to_step_and_between_training_and_validation():
    val = StepDataset(ArrayStore(), MASKED, range(8), 3, 4, stream="val")
    drawn = [[data[k][name].mask.flatten(1) for name in ("global_0", "global_1")] for data in (dataset(spec=MASKED), val) for k in range(4)]
    assert len({str([mask.nonzero().tolist() for mask in masks]) for masks in drawn}) == 8
    assert len({str([mask.sum(1).tolist() for mask in masks]) for masks in drawn}) == 8


def test_hidden_cells_go_to_the_device_with_their_view():
    view = dataset(spec=MASKED)[0]["global_0"]
    moved = view.to(torch.device("meta"))
    assert moved.hidden.device.type == moved.mask.device.type == moved.image.device.type == "meta" and moved.hidden.shape == view.hidden.shape


def test_every_case_is_drawn_once_per_pass():
    data = dataset(cases=[1, 3, 4, 6, 7])
    for turn in range(20):
        assert sorted(data.case(turn * 5 + i) for i in range(5)) == [1, 3, 4, 6, 7]
    assert len({tuple(data.case(turn * 5 + i) for i in range(5)) for turn in range(20)}) > 10


def test_other_seeds_give_other_batches():
    other = StepDataset(ArrayStore(), SPEC, list(range(8)), 4, 4)
    assert digest(other[0]) != digest(dataset()[0])


@pytest.mark.parametrize(("subjects", "held_out"), [(1, 0), (2, 0), (3, 1), (10, 1), (40, 4)])
def test_a_tenth_of_the_subjects_is_held_out_and_no_subject_is_on_both_sides(subjects, held_out):
    names = [f"s{i % subjects}" for i in range(3 * subjects)]
    train, val = split_subjects(names, seed=1)
    assert sorted(train + val) == list(range(len(names)))
    assert len({names[i] for i in val}) == held_out
    assert not {names[i] for i in val} & {names[i] for i in train}


def test_the_split_does_not_depend_on_the_order_of_the_cases():
    names = [f"s{i}" for i in range(30)]
    shuffled = list(np.random.default_rng(0).permutation(names))
    assert {names[i] for i in split_subjects(names, 2)[1]} == {shuffled[i] for i in split_subjects(shuffled, 2)[1]}


def test_cases_have_the_same_number_exactly_if_they_have_the_same_subject():
    names = ["anna", "ben", "anna", "carl", "ben"]
    store = SimpleNamespace(subject=names.__getitem__)
    numbers = subject_numbers(store, range(5))
    assert [[a == b for b in numbers] for a in numbers] == [[a == b for b in names] for a in names]
    assert subject_numbers(store, [3]) == numbers[3:4] and all(0 <= number < 2**63 for number in numbers)
