"""Conversion and crops as a user runs them, up to the preprocessed store."""

import csv
import json

import h5py
import numpy as np
import pytest

from nnssl_ext.cli import convert, plan_and_preprocess
from nnssl_ext.io.index import read_index
from nnssl_ext.io.readers import read_case, read_volume
from nnssl_ext.preprocessing.store import CaseStore
from tests.make_raw import body_volume, nnunet_dataset, write_image


def error_of(capsys):
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ") and len(text.splitlines()) <= 3
    return text


def luna(root, broken=False):
    for subset in range(2):
        write_image(root / f"subset{subset}" / f"1.2.840.{subset}.mhd", body_volume(index=subset))
    if broken:
        (root / "subset1" / "1.2.840.1.raw").unlink()
    return root


def test_a_download_is_converted_and_then_preprocessed(folders, tmp_path):
    source = luna(tmp_path / "LUNA16")
    assert convert.main([str(source), "-d", "801", "-name", "LUNA16", "-np", "2"]) == 0
    folder = folders["nnssl_raw"] / "Dataset801_LUNA16"
    assert [np.array_equal(read_case(case)[0][0], body_volume(index=i)) for i, case in enumerate(read_index(folder))] == [True, True]
    assert plan_and_preprocess.main(["-d", "801", "-gpu_memory_target", "0.5", "-np", "1"]) == 0
    assert len(CaseStore(folders["nnssl_preprocessed"] / "Dataset801_LUNA16" / "nnsslPlans_3d_fullres")) == 2


def test_broken_cases_end_with_exit_code_1(folders, tmp_path, capsys):
    assert convert.main([str(luna(tmp_path / "LUNA16", broken=True)), "-d", "801", "-name", "LUNA16", "-np", "1"]) == 1
    assert "failed: 1.2.840.1" in capsys.readouterr().out
    assert len(read_index(folders["nnssl_raw"] / "Dataset801_LUNA16")) == 1


def test_nlst_hdf5_files_become_nifti_with_patients_and_visits(folders, tmp_path):
    for patient, visit in (("p1", "t0"), ("p1", "t1"), ("p2", "t0")):
        path = tmp_path / "nlst" / patient / visit / "image0.hdf5"
        path.parent.mkdir(parents=True)
        with h5py.File(path, "w") as file:
            data = file.create_dataset("image", data=body_volume((9, 10, 11)))
            data.attrs["spacing"] = (2.5, 0.7, 0.7)
    assert convert.main([str(tmp_path / "nlst"), "-d", "801", "-name", "NLST", "-np", "1", "-modality", "CT"]) == 0
    cases = read_index(folders["nnssl_raw"] / "Dataset801_NLST")
    assert len(cases) == 3 and len({case.subject for case in cases}) == 2 and {case.modalities for case in cases} == {("CT",)}
    array, geometry = read_volume(cases[0].images[0])
    assert np.array_equal(array, body_volume((9, 10, 11))) and np.allclose(geometry.spacing, (2.5, 0.7, 0.7), rtol=0, atol=1e-6)


def test_crops_of_a_dataset_become_a_dataset(folders):
    nnunet_dataset(folders["nnssl_raw"], cases=2)
    options = ["--crops", "4", "-size", "8", "8", "8", "-spacing", "3", "3", "3", "-foreground", "0.7", "-np", "1"]
    assert convert.main(["801", "-d", "805", "-name", "CROPS", *options]) == 0
    folder = folders["nnssl_raw"] / "Dataset805_CROPS"
    assert [read_case(case)[0].shape for case in read_index(folder)] == [(1, 8, 8, 8)] * 4
    with open(folder / "crops.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["crop"] for row in rows] == [f"crop{i:06d}" for i in range(4)] and all(float(row["foreground"]) >= 0.7 for row in rows)


def test_crops_of_a_download_leave_its_test_set_alone(folders, tmp_path):
    for number, part in enumerate(("train", "val")):
        write_image(tmp_path / "LiTS" / part / "ct" / f"volume-{number}.nii", body_volume(index=number))
    options = ["--crops", "5", "-size", "8", "8", "8", "-spacing", "3", "2", "2", "-foreground", "0.5", "-np", "1"]
    assert convert.main([str(tmp_path / "LiTS"), "-d", "805", "-name", "CROPS", *options]) == 0
    assert {line.split(",")[1] for line in (folders["nnssl_raw"] / "Dataset805_CROPS" / "crops.csv").read_text().splitlines()[1:]} == {"volume-0"}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere", "-d", "801", "-name", "A"], "unknown dataset 'nowhere'"),
        (["{empty}", "-d", "801", "-name", "A"], "no case found"),
        (["{luna}", "-d", "801", "-name", "A b"], "makes no dataset name"),
        (["{luna}", "-d", "801", "-name", "A", "-layout", "brats"], "unknown layout"),
        (["{luna}", "-d", "801", "-name", "A", "-layout", "lits17"], "volume-N"),
        (["{luna}", "-d", "801", "-name", "A", "-modality", "T1w", "T2w"], "2 modalities were given"),
        (["{luna}", "-d", "900", "-name", "A"], "ID 900 belongs to Dataset900_Mine"),
        (["{luna}", "-d", "900", "-name", "Mine"], "not made by nnssl_convert"),
        (["{luna}", "-d", "801", "-name", "A", "--crops", "3"], "no volume has a crop of 128x128x128"),
        (["{luna}", "-d", "801", "-name", "A", "--crops", "0"], "nothing to cut"),
        (["{luna}", "-d", "801", "-name", "A", "--crops", "3", "-foreground", "70"], "between 0 and 1"),
        (["{luna}", "-d", "801", "-name", "A", "--crops", "3", "-size", "0", "8", "8"], "positive"),
    ],
)
def test_a_mistake_is_one_error_of_three_lines(folders, tmp_path, capsys, arguments, said):
    places = {"{luna}": luna(tmp_path / "LUNA16"), "{empty}": tmp_path / "empty"}
    (tmp_path / "empty").mkdir()
    nnunet_dataset(folders["nnssl_raw"], cases=1, name="Dataset900_Mine")
    assert convert.main([str(places.get(argument, argument)) for argument in arguments] + ["-np", "1"]) == 2
    assert said in error_of(capsys)


def test_nothing_that_names_a_patient_is_taken_over(folders, tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    write_image(source / "a.nii.gz", body_volume())
    image = {"name": "a.nii.gz", "modality": "CT", "image_path": "a.nii.gz", "image_info": {"PatientName": "Jane Doe"}}
    session = {"session_id": "t0", "session_info": {"date": "2001-01-01"}, "images": [image]}
    subject = {"subject_id": "s", "subject_info": {"age": 99}, "sessions": {"t0": session}}
    (source / "pretrain_data.json").write_text(json.dumps({"datasets": {"1": {"dataset_info": {"hospital": "H"}, "subjects": {"s": subject}}}}))
    assert convert.main([str(source), "-d", "801", "-name", "A", "-np", "1"]) == 0
    for path in (folders["nnssl_raw"] / "Dataset801_A").rglob("*.json"):
        assert not any(word in path.read_text() for word in ("Jane", "2001", "99", "hospital"))
