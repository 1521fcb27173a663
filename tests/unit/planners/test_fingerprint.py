"""One pass over a dataset: what planning reads."""

import json

import numpy as np
import pytest
import SimpleITK

from nnssl_ext.core.errors import UserError
from nnssl_ext.io.index import read_index
from nnssl_ext.planners.fingerprint import SAMPLES, extract_fingerprint
from nnssl_ext.preprocessing.crop import body_mask, bounding_box
from nnssl_ext.preprocessing.parallel import Workers
from tests.make_raw import body_volume, nnunet_dataset, pretrain_dataset, write_image


def test_shapes_spacings_boxes_and_sizes_of_every_case_are_recorded(folders):
    raw = nnunet_dataset(folders["nnssl_raw"], cases=2, channels=2)
    found = extract_fingerprint("Dataset801_Test", Workers(1))
    assert found == json.loads((folders["nnssl_preprocessed"] / "Dataset801_Test" / "dataset_fingerprint.json").read_text())
    assert set(found) == {"schema_version", "dataset_name", "nnssl_ext_version", "channels", "cases", "intensities", "failed"}
    assert found["channels"] == 2 and sorted(found["cases"]) == ["case0", "case1"] and found["failed"] == {}
    case, box = found["cases"]["case1"], bounding_box(body_mask(body_volume(index=1), "CT"))
    assert (case["shape"], case["spacing"], case["origin"]) == ([20, 24, 28], [3, 2, 2], [10, -20, 30])
    assert case["direction"] == [1, 0, 0, 0, 1, 0, 0, 0, 1] and case["modalities"] == ["CT", "CT"] and case["subject"] == "case1"
    assert case["body_box"] == [list(edge) for edge in box] and case["shape_after_crop"] == [high - low for low, high in box]
    assert case["file_bytes"] == sum(path.stat().st_size for path in (raw / "imagesTr").glob("case1_*"))


def test_intensities_are_those_of_the_body(folders):
    nnunet_dataset(folders["nnssl_raw"], cases=3)
    found = extract_fingerprint("Dataset801_Test", Workers(1))["intensities"]["CT"]
    volumes = [body_volume(index=i).astype(np.float64) for i in range(3)]
    values = np.concatenate([volume[body_mask(volume, "CT")] for volume in volumes])
    assert len(values) < 3 * SAMPLES and found["voxels"] == len(values)  # few enough to be all taken
    assert found["mean"] == pytest.approx(values.mean()) and found["std"] == pytest.approx(values.std())
    assert (found["min"], found["max"], found["median"]) == (values.min(), values.max(), np.median(values))
    assert [found["percentile_00_5"], found["percentile_99_5"]] == pytest.approx(list(np.percentile(values, (0.5, 99.5))))


def test_modalities_are_described_apart(folders):
    pretrain_dataset(folders["nnssl_raw"])
    found = extract_fingerprint("Dataset802_Test", Workers(1))["intensities"]
    assert set(found) == {"CT", "MR"} and found["MR"]["mean"] > found["CT"]["mean"] + 900


def test_large_cases_are_sampled_and_no_case_changes_the_draws_of_another(folders):
    raw = nnunet_dataset(folders["nnssl_raw"], cases=1)
    write_image(raw / "imagesTr" / "case0_0000.nii.gz", body_volume((48, 48, 48)))
    alone = extract_fingerprint("Dataset801_Test", Workers(1))["intensities"]["CT"]
    assert alone["voxels"] == SAMPLES
    write_image(raw / "imagesTr" / "before_0000.nii.gz", body_volume((8, 8, 8), index=1))
    both = extract_fingerprint("Dataset801_Test", Workers(1))["intensities"]["CT"]
    small = body_volume((8, 8, 8), index=1).astype(np.float64)
    inside = small[body_mask(small, "CT")]
    assert both["mean"] * both["voxels"] == pytest.approx(alone["mean"] * SAMPLES + inside.sum())


def test_one_and_two_processes_write_the_same_file(folders):
    nnunet_dataset(folders["nnssl_raw"], cases=3)
    file = folders["nnssl_preprocessed"] / "Dataset801_Test" / "dataset_fingerprint.json"
    extract_fingerprint("Dataset801_Test", Workers(1))
    single = file.read_bytes()
    extract_fingerprint("Dataset801_Test", Workers(2))
    assert file.read_bytes() == single


def test_unreadable_cases_are_listed_and_the_others_described(folders):
    raw = nnunet_dataset(folders["nnssl_raw"], cases=3)
    path = raw / "imagesTr" / "case1_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:100])
    found = extract_fingerprint("Dataset801_Test", Workers(1))
    assert sorted(found["cases"]) == ["case0", "case2"] and list(found["failed"]) == ["case1"]
    assert "truncated" in found["failed"]["case1"] and str(path) in found["failed"]["case1"]


def test_a_dataset_without_a_readable_case_is_refused(folders):
    raw = nnunet_dataset(folders["nnssl_raw"], cases=1)
    SimpleITK.WriteImage(SimpleITK.Image([8, 8], SimpleITK.sitkInt16), str(raw / "imagesTr" / "case0_0000.nii.gz"))
    with pytest.raises(UserError, match="no case of Dataset801_Test could be read"):
        extract_fingerprint("Dataset801_Test", Workers(1))


def test_the_index_beside_it_is_in_nnssls_schema_without_the_patients(folders):
    raw = pretrain_dataset(folders["nnssl_raw"])
    content = json.loads((raw / "pretrain_data.json").read_text())
    content["datasets"]["7"]["subjects"]["s1"]["sessions"]["ses0"]["images"][0]["associated_masks"] = {"anatomy_mask": "$nnssl_raw/Dataset802_Test/body.nii.gz"}
    (raw / "pretrain_data.json").write_text(json.dumps(content))
    extract_fingerprint("Dataset802_Test", Workers(1))
    written = folders["nnssl_preprocessed"] / "Dataset802_Test" / "pretrain_data.json"
    assert "age" not in json.loads(written.read_text())["datasets"]["802"]["subjects"]["7/s1"]["subject_info"]
    assert str(folders["nnssl_raw"]) not in written.read_text()
    (before, after) = (read_index(folder) for folder in (raw, written.parent))
    assert [(case.images, case.modalities, case.anatomy_mask) for case in after] == [(case.images, case.modalities, case.anatomy_mask) for case in before]
    assert before[2].anatomy_mask == raw / "body.nii.gz"
