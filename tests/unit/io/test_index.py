"""Datasets to cases."""

import json
import shutil

import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.io.index import read_index
from tests.make_raw import body_volume, nnunet_dataset, pretrain_dataset, write_image


def fails(folder, message):
    with pytest.raises(UserError) as error:
        read_index(folder)
    assert message in str(error.value) and len(str(error.value).splitlines()) <= 3


def test_an_nnunet_raw_folder_gives_a_case_per_volume_with_all_channels(tmp_path):
    cases = read_index(nnunet_dataset(tmp_path, cases=3, channels=2))
    assert [case.identifier for case in cases] == ["case0", "case1", "case2"]
    assert [path.name for path in cases[1].images] == ["case1_0000.nii.gz", "case1_0001.nii.gz"]
    assert cases[0].modalities == ("CT", "CT") and cases[0].subject == "case0"


def test_dataset_json_can_name_the_subjects(tmp_path):
    folder = nnunet_dataset(tmp_path, cases=3)
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    (folder / "dataset.json").write_text(json.dumps(content | {"subjects": {"case0": "anna", "case2": "anna"}}), encoding="utf-8")
    assert [case.subject for case in read_index(folder)] == ["anna", "case1", "anna"]
    (folder / "dataset.json").write_text(json.dumps(content | {"subjects": ["anna"]}), encoding="utf-8")
    fails(folder, '"subjects" of dataset.json is no table of cases')


def test_unlabelled_images_beside_the_training_images_are_used_too(tmp_path):
    folder = nnunet_dataset(tmp_path, cases=1)
    write_image(folder / "imagesUn" / "extra_0000.nii.gz", body_volume())
    assert [case.identifier for case in read_index(folder)] == ["case0", "extra"]


def test_pretrain_data_gives_subjects_sessions_and_resolved_paths(folders):
    cases = read_index(pretrain_dataset(folders["nnssl_raw"]))
    assert len(cases) == 6 and all(path.is_file() for case in cases for path in case.images)
    assert cases[0].identifier == "7__s0__ses0__CT" and cases[0].modalities == ("CT",)
    assert {case.subject for case in cases} == {"7/s0", "7/s1", "7/s2"}


def test_masks_of_anatomy_and_anonymisation_belong_to_the_case(folders):
    folder = pretrain_dataset(folders["nnssl_raw"])
    content = json.loads((folder / "pretrain_data.json").read_text())
    image = content["datasets"]["7"]["subjects"]["s0"]["sessions"]["ses0"]["images"][0]
    image["associated_masks"] = {"anonymization_mask": "$nnssl_raw/Dataset802_Test/face.nii.gz", "anatomy_mask": None}
    (folder / "pretrain_data.json").write_text(json.dumps(content))
    cases = read_index(folder)
    assert cases[0].anonymization_mask == folder / "face.nii.gz" and cases[0].anatomy_mask is None
    assert cases[1].anonymization_mask is None


def test_missing_and_empty_folders_are_refused(tmp_path):
    fails(tmp_path / "none", "dataset folder not found")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "neither pretrain_data.json nor dataset.json")
    folder = nnunet_dataset(tmp_path)
    shutil.rmtree(folder / "imagesTr")
    fails(folder, "holds no image")


def test_cases_of_unequal_channels_are_named(tmp_path):
    folder = nnunet_dataset(tmp_path, cases=3, channels=2)
    (folder / "imagesTr" / "case1_0001.nii.gz").unlink()
    fails(folder, "dataset.json names the channels [0, 1], 1 of 3 cases have others: case1 has [0]")


def test_files_that_other_systems_leave_behind_are_not_images(tmp_path):
    folder = nnunet_dataset(tmp_path, cases=1)
    (folder / "imagesTr" / "._case0_0000.nii.gz").write_bytes(b"macOS")
    assert len(read_index(folder)) == 1


@pytest.mark.parametrize("content", ["[]", "{}", '{"channel_names": {"CT": 0}}', '{"channel_names": ["CT"]}'])
def test_a_description_without_channel_numbers_is_refused(content, tmp_path):
    folder = nnunet_dataset(tmp_path, cases=1)
    (folder / "dataset.json").write_text(content)
    fails(folder, "names no channels by number")


def test_the_former_name_of_the_channels_is_read_too(tmp_path):
    folder = nnunet_dataset(tmp_path, cases=1)
    (folder / "dataset.json").write_text('{"modality": {"0": "T1"}}')
    assert read_index(folder)[0].modalities == ("T1",)


def test_names_without_a_channel_number_are_named(tmp_path):
    folder = nnunet_dataset(tmp_path)
    write_image(folder / "imagesTr" / "scan.nii.gz", body_volume())
    fails(folder, "does not end in a channel number")


def test_broken_indices_are_named(folders):
    folder = pretrain_dataset(folders["nnssl_raw"])
    content = json.loads((folder / "pretrain_data.json").read_text())
    session = content["datasets"]["7"]["subjects"]["s0"]["sessions"]["ses0"]
    session["images"].append(session["images"][0])
    (folder / "pretrain_data.json").write_text(json.dumps(content))
    fails(folder, "used twice")
    del session["images"][1]["modality"], session["images"][0]
    (folder / "pretrain_data.json").write_text(json.dumps(content))
    fails(folder, "malformed")
    (folder / "pretrain_data.json").write_text("{")
    fails(folder, "not valid JSON")
