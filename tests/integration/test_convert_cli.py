"""Conversion and crops as a user runs them, up to the preprocessed store."""

import csv
import gzip
import json

import h5py
import numpy as np
import pytest
import SimpleITK
from scipy.spatial.transform import Rotation

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


def dicom_series(folder, uid, array, spacing, origin, direction):
    """A series of one file per slice, as scanners write it, with the patient's name."""
    folder.mkdir(parents=True)
    axes = np.reshape(direction, (3, 3))
    for z, plane in enumerate(array):
        image = SimpleITK.GetImageFromArray(plane[None])
        image.SetSpacing(spacing)
        tags = {"0008|0060": "CT", "0008|0031": "120000", "0010|0010": "Doe^Jane", "0010|0020": "Jane77", "0020|000d": "1.2.3", "0020|000e": uid}
        tags["0008|0016"], tags["0008|0018"], tags["0020|0013"] = "1.2.840.10008.5.1.4.1.1.2", f"{uid}.{z + 1}", str(z + 1)
        tags["0020|0032"] = "\\".join(f"{v:.8g}" for v in np.asarray(origin) + axes[:, 2] * spacing[2] * z)
        tags["0020|0037"] = "\\".join(f"{v:.10g}" for v in (*axes[:, 0], *axes[:, 1]))
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer = SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{z:03d}.dcm"))
        writer.Execute(image)


def test_dicom_series_become_nifti_of_the_same_integers_at_the_same_place_without_the_patient(folders, tmp_path):
    direction = Rotation.from_euler("xyz", (10, -20, 30), degrees=True).as_matrix().ravel()
    array, spacing, origin = body_volume((5, 8, 9)), (0.7, 0.8, 2.5), (-101.5, 33.25, 7.125)
    dicom_series(tmp_path / "archive" / "p1" / "series", "1.2.3.4", array, spacing, origin, direction)
    assert convert.main([str(tmp_path / "archive"), "-d", "801", "-name", "A", "-np", "1"]) == 0
    folder = folders["nnssl_raw"] / "Dataset801_A"
    (case,) = read_index(folder)
    stored, geometry = read_volume(case.images[0])
    assert np.array_equal(stored, array) and case.modalities == ("CT",)
    for voxel in ((0, 0, 0), (4, 7, 8), (0, 7, 0)):
        expected = np.asarray(origin) + np.reshape(direction, (3, 3)) @ (np.asarray(voxel[::-1]) * spacing)
        assert np.allclose(geometry.to_world(voxel), expected, rtol=0, atol=1e-4)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert b"Jane" not in content and "Jane" not in path.name


def test_crops_of_a_dataset_become_a_dataset(folders):
    nnunet_dataset(folders["nnssl_raw"], cases=2)
    options = ["--crops", "4", "-size", "8", "8", "8", "-spacing", "3", "3", "3", "-foreground", "0.7", "-np", "1"]
    assert convert.main(["801", "-d", "805", "-name", "CROPS", *options]) == 0
    folder = folders["nnssl_raw"] / "Dataset805_CROPS"
    assert (folder / "pretrain_data.json").is_file() and (folder / "dataset.json").is_file()
    assert [read_case(case)[0].shape for case in read_index(folder)] == [(1, 8, 8, 8)] * 4
    with open(folder / "crops.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["crop"] for row in rows] == [f"crop{i:06d}" for i in range(4)] and all(float(row["foreground"]) >= 0.7 for row in rows)


def test_the_same_command_with_another_format_writes_the_index_again(folders):
    nnunet_dataset(folders["nnssl_raw"], cases=1)
    command = ["801", "-d", "805", "-name", "CROPS", "--crops", "2", "-size", "8", "8", "8", "-spacing", "3", "3", "3", "-np", "1"]
    assert convert.main(command) == 0 and convert.main([*command, "-format", "nnunet"]) == 0
    assert [case.identifier for case in read_index(folders["nnssl_raw"] / "Dataset805_CROPS")] == ["crop000000", "crop000001"]


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
        (["{luna}", "-d", "801", "-name", "A", "--crops", "3", "-foreground", "70"], "between 0 and 1"),
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
    session = {"session_id": "t0", "session_info": {"date": "May Day"}, "images": [image]}
    subject = {"subject_id": "s", "subject_info": {"age": "ninety"}, "sessions": {"t0": session}}
    (source / "pretrain_data.json").write_text(json.dumps({"datasets": {"1": {"dataset_info": {"hospital": "H"}, "subjects": {"s": subject}}}}))
    assert convert.main([str(source), "-d", "801", "-name", "A", "-np", "1"]) == 0
    for path in (folders["nnssl_raw"] / "Dataset801_A").rglob("*.json"):
        assert not any(word in path.read_text() for word in ("Jane", "May Day", "ninety", "hospital"))
