"""One pass over a dataset: what planning reads."""

import json

import numpy as np
import pytest
import SimpleITK

from nnssl_ext.core.errors import UserError
from nnssl_ext.io import journal
from nnssl_ext.io.index import read_index
from nnssl_ext.planners import fingerprint
from nnssl_ext.planners.fingerprint import CACHE, SAMPLES, TOTAL_SAMPLES, examine, extract_fingerprint, sample_count
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


def test_the_intensities_of_all_cases_together_stay_bounded():
    assert [sample_count(channels) for channels in (1, 1000, 1001, 10_000, 10_001, 100_000)] == [10_000, 10_000, 1000, 1000, 100, 100]
    assert all(channels * sample_count(channels) <= TOTAL_SAMPLES for channels in range(1, 100_001, 997))


def test_fewer_samples_of_known_cases_are_those_of_a_new_pass(folders, monkeypatch):
    raw = nnunet_dataset(folders["nnssl_raw"], cases=2)
    write_image(raw / "imagesTr" / "case0_0000.nii.gz", body_volume((48, 48, 48)))  # more body than samples; case1 has less
    folder = folders["nnssl_preprocessed"] / "Dataset801_Test"
    examine("Dataset801_Test", Workers(1))
    monkeypatch.setattr(fingerprint, "TOTAL_SAMPLES", 2000)
    reads = []
    describe = fingerprint._describe
    monkeypatch.setattr(fingerprint, "_describe", lambda case, samples: reads.append(samples) or describe(case, samples))
    known = {name: values[0] for name, values in examine("Dataset801_Test", Workers(1)).samples.items()}
    assert reads == [] and {len(values) for values in known.values()} == {1000}
    (folder / CACHE / "all.jsonl").unlink()
    new = examine("Dataset801_Test", Workers(1)).samples
    assert reads == [1000, 1000] and all(np.array_equal(known[name], new[name][0]) for name in known)
    monkeypatch.setattr(fingerprint, "TOTAL_SAMPLES", TOTAL_SAMPLES)
    examine("Dataset801_Test", Workers(1))
    assert reads == [1000, 1000, SAMPLES, SAMPLES]  # too few are known


def test_a_case_whose_record_got_lost_is_a_failure(folders, monkeypatch):
    nnunet_dataset(folders["nnssl_raw"], cases=2)
    append = journal.append
    monkeypatch.setattr(journal, "append", lambda folder, record: append(folder, record) if record["name"] == "case0" else None)
    found = extract_fingerprint("Dataset801_Test", Workers(1))
    assert list(found["cases"]) == ["case0"] and "did not arrive" in found["failed"]["case1"]


def test_an_unexpected_error_quarantines_its_case_alone(folders, monkeypatch):
    nnunet_dataset(folders["nnssl_raw"], cases=3)
    mask = fingerprint.body_mask
    monkeypatch.setattr(fingerprint, "body_mask", lambda volume, modality: mask(volume, modality) if volume.max() != body_volume(index=1).max() else 1 / 0)
    found = examine("Dataset801_Test", Workers(1))
    assert found.counts() == {"ok": 2, "warning": 0, "quarantined": 1} and [finding.kind for finding in found.findings["case1"]] == ["unexpected"]


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
