import os

import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.paths import dataset_name, datasets, preprocessed_folder, raw_folder, results_folder, root


def test_an_unset_variable_is_named_with_the_line_that_sets_it():
    with pytest.raises(UserError, match="nnssl_raw is not set") as caught:
        root("nnssl_raw")
    assert caught.value.fix == "export nnssl_raw=/path/to/nnssl_raw"


def test_variables_are_read_when_needed_and_not_at_import(monkeypatch, tmp_path):
    monkeypatch.setenv("nnssl_raw", str(tmp_path))
    assert root("nnssl_raw") == tmp_path
    monkeypatch.setenv("nnssl_raw", str(tmp_path / "other"))
    assert root("nnssl_raw") == tmp_path / "other"


def test_only_folders_named_like_a_dataset_count(tmp_path):
    for name in ("Dataset801_A", "Dataset1234_B_C", "Dataset12_short", "dataset802_lower", "Dataset803_", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "Dataset804_file").touch()
    assert datasets(tmp_path) == {801: ["Dataset801_A"], 1234: ["Dataset1234_B_C"]}
    assert datasets(tmp_path / "missing") == {}


@pytest.mark.parametrize("identifier", [801, "801", "Dataset801_Heads"])
def test_a_dataset_is_found_by_number_text_or_name(folders, identifier):
    (folders["nnssl_raw"] / "Dataset801_Heads").mkdir()
    assert dataset_name(identifier) == "Dataset801_Heads"


def test_a_dataset_that_is_only_preprocessed_is_found(folders):
    (folders["nnssl_preprocessed"] / "Dataset801_Heads").mkdir()
    assert dataset_name(801) == "Dataset801_Heads"


def test_the_same_dataset_in_two_folders_is_not_ambiguous(folders):
    for folder in folders.values():
        (folder / "Dataset801_Heads").mkdir()
    assert dataset_name(801) == "Dataset801_Heads"


def test_one_number_with_two_names_is_refused_and_both_are_named(folders):
    (folders["nnssl_raw"] / "Dataset801_Heads").mkdir()
    (folders["nnssl_results"] / "Dataset801_Knees").mkdir()
    with pytest.raises(UserError, match="Dataset801_Heads, Dataset801_Knees"):
        dataset_name(801)


def test_an_unknown_number_lists_the_known_ones(folders):
    (folders["nnssl_raw"] / "Dataset801_Heads").mkdir()
    with pytest.raises(UserError, match="unknown dataset ID 802") as caught:
        dataset_name("802")
    assert caught.value.fix == "known IDs: 801; a dataset is a folder Dataset802_NAME"


def test_a_misspelt_name_gets_the_closest_one(folders):
    (folders["nnssl_raw"] / "Dataset801_Heads").mkdir()
    with pytest.raises(UserError, match="unknown dataset 'Dataset801_Head'") as caught:
        dataset_name("Dataset801_Head")
    assert caught.value.fix == "did you mean 'Dataset801_Heads'?"


def test_the_first_folder_must_be_set_and_the_others_need_not(folders, monkeypatch):
    (folders["nnssl_raw"] / "Dataset801_Heads").mkdir()
    monkeypatch.delenv("nnssl_preprocessed")
    monkeypatch.delenv("nnssl_results")
    assert dataset_name(801) == "Dataset801_Heads"
    monkeypatch.delenv("nnssl_raw")
    with pytest.raises(UserError, match="nnssl_raw is not set"):
        dataset_name(801)


def test_folders_are_below_their_variables(folders):
    for function, name in ((raw_folder, "nnssl_raw"), (preprocessed_folder, "nnssl_preprocessed"), (results_folder, "nnssl_results")):
        assert function("Dataset801_A") == folders[name] / "Dataset801_A"


def test_an_empty_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("nnssl_raw", "")
    with pytest.raises(UserError):
        root("nnssl_raw")
    assert os.environ["nnssl_raw"] == ""
