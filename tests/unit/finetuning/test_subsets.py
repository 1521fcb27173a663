"""Nested subsets of labelled cases."""

import json

import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl_ext.core.errors import UserError
from nnssl_ext.finetuning.subsets import nested_subset, training_cases
from tests.make_nnunet import make_dataset, make_roots

CASES = [f"case{i:02d}" for i in range(24)]
pytestmark = pytest.mark.nnunet


def test_fewer_cases_lie_within_more():
    chosen = [nested_subset(CASES, count) for count in range(1, 25)]
    assert [len(subset) for subset in chosen] == list(range(1, 25))
    assert all(set(small) < set(large) for small, large in zip(chosen, chosen[1:]))


def test_the_subset_is_always_the_same_and_no_mere_beginning():
    assert nested_subset(CASES, 4) == nested_subset(CASES[::-1], 4)[::-1] == ["case06", "case08", "case12", "case21"]


def test_more_cases_in_the_dataset_leave_the_order_of_the_others():
    more = nested_subset([*CASES, *(f"new{i}" for i in range(6))], 12)
    kept = [case for case in more if case in CASES]
    assert 0 < len(kept) < 12 and nested_subset(CASES, len(kept)) == kept


@pytest.mark.parametrize(("ratio", "count"), [(0.001, 1), (0.1, 2), (0.4, 10), (0.5, 12), (1.0, 24)])
def test_a_fraction_is_rounded_to_at_least_one_case(ratio, count):
    assert nested_subset(CASES, ratio) == nested_subset(CASES, count)


def test_more_than_there_are_is_a_user_error():
    with pytest.raises(UserError, match="25 labelled cases are wanted; the fold trains on 24"):
        nested_subset(CASES, 25)


@pytest.fixture
def roots(tmp_path, monkeypatch):
    return make_roots(tmp_path, monkeypatch)


def stock(cases, folder, fold):
    """What nnU-Net's own trainer decides, without a trainer around it."""

    class Dataset:
        identifiers = cases

        def __init__(self, *_, **__):
            pass

        @staticmethod
        def get_identifiers(_):
            return cases

    trainer = object.__new__(nnUNetTrainer)
    trainer.__dict__ |= {"dataset_class": Dataset, "fold": fold, "preprocessed_dataset_folder": "", "preprocessed_dataset_folder_base": str(folder)}
    trainer.__dict__ |= {"folder_with_segs_from_previous_stage": None, "print_to_log_file": lambda *_: None}
    return list(trainer.do_split()[0])


@pytest.mark.parametrize("place", [None, "nnUNet_preprocessed", "nnUNet_raw"])
@pytest.mark.parametrize("fold", [0, 3, "all"])
def test_the_cases_of_a_fold_are_those_of_nnunet(roots, fold, place):
    dataset = make_dataset(roots, 901, cases=7)
    folder = roots["nnUNet_preprocessed"] / dataset
    folder.mkdir()
    if place is not None:
        splits = [{"train": ["case1", "case2", "case6"], "val": ["case0"]}]
        (roots[place] / dataset / "splits_final.json").write_text(json.dumps(splits))
    found = training_cases(dataset, str(fold))
    if place == "nnUNet_raw":  # nnU-Net's planner copies it
        (folder / "splits_final.json").write_text(json.dumps(splits))
    expected = stock([f"case{i}" for i in range(7)], folder, fold)
    assert len(found) == len(expected)
    if place is None or fold != 3:  # where there are fewer folds nnU-Net draws cases at random
        assert found == expected
