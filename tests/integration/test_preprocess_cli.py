"""Fingerprint, plan and preprocessing as a user runs them."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnssl_ext.cli import extract_fingerprint, plan_and_preprocess, plan_experiment, preprocess
from nnssl_ext.core import files
from nnssl_ext.preprocessing.crop import body_mask
from nnssl_ext.preprocessing.store import CaseStore
from tests.make_raw import body_volume, nnunet_dataset, pretrain_dataset, write_image

ROOT = Path(__file__).parents[2]
FAST = ["-gpu_memory_target", "0.5", "-np", "1"]


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.suffix in (".b2nd", ".json")}


def store_of(folders, name="Dataset801_Test", configuration="3d_fullres"):
    return folders["nnssl_preprocessed"] / name / f"nnsslPlans_{configuration}"


def error_of(capsys):
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ") and len(text.splitlines()) <= 3
    return text


def test_raw_volumes_become_normalised_cases(folders):
    nnunet_dataset(folders["nnssl_raw"])
    assert plan_and_preprocess.main(["-d", "801", *FAST]) == 0
    store = CaseStore(store_of(folders))
    assert store.identifiers == ["case0", "case1", "case2"]
    plan = json.loads((store.folder.parent / "nnsslPlans.json").read_text())["configurations"]["3d_fullres"]
    statistics = plan["normalization"]["CT"]
    raw, body = body_volume(index=1).astype(np.float32), body_mask(body_volume(index=1), "CT")
    (low, high), *_ = np.array(store.info(1)["body_box"])
    assert body[low:high].sum() == body.sum()
    expected = (np.clip(raw[body], statistics["low"], statistics["high"]) - statistics["mean"]) / statistics["std"]
    inside = tuple(slice(a, b) for a, b in store.info(1)["body_box"])
    assert np.allclose(store.read(1)[0][body[inside]], expected, atol=1e-5)  # the median spacing is the cases' own: nothing is resampled
    assert store.geometry(1).to_world((0, 0, 0)) == pytest.approx(
        np.array([10, -20, 30]) + np.array([b[0] for b in store.info(1)["body_box"]])[::-1] * [2, 2, 3]
    )


def test_all_configurations_share_the_world(folders):
    nnunet_dataset(folders["nnssl_raw"], cases=1)
    assert plan_and_preprocess.main(["-d", "801", "-c", "3d_fullres", "onemmiso", "noresample", *FAST]) == 0
    for configuration, spacing in (("3d_fullres", (3, 2, 2)), ("onemmiso", (1, 1, 1)), ("noresample", (3, 2, 2))):
        store = CaseStore(store_of(folders, configuration=configuration))
        geometry, raw_box = store.geometry(0), store.info(0)["body_box"]
        assert geometry.spacing == pytest.approx(spacing, rel=0.03)
        first = np.array([10, -20, 30]) + (np.array([b[0] for b in raw_box]) - 0.5)[::-1] * [2, 2, 3]  # outer corner of the cropped box
        assert geometry.to_world((-0.5, -0.5, -0.5)) == pytest.approx(first, abs=1e-4)


def test_mixed_modalities_are_normalised_each_in_its_own_way(folders):
    pretrain_dataset(folders["nnssl_raw"])
    assert plan_and_preprocess.main(["-d", "802", *FAST]) == 0
    store = CaseStore(store_of(folders, "Dataset802_Test"))
    schemes = {store.info(i)["modalities"][0]: store.info(i)["normalization"][0]["scheme"] for i in range(len(store))}
    assert schemes == {"CT": "ct", "MR": "zscore"}
    assert '"age"' not in json.dumps([store.info(i) for i in range(len(store))])


def test_finished_cases_are_skipped_and_changed_ones_redone(folders, capsys):
    raw = nnunet_dataset(folders["nnssl_raw"])
    plan_and_preprocess.main(["-d", "801", *FAST])
    before = {p.name: p.stat().st_mtime_ns for p in store_of(folders).glob("*.b2nd")}
    write_image(raw / "imagesTr" / "case1_0000.nii.gz", body_volume(index=9))
    capsys.readouterr()
    assert preprocess.main(["-d", "801", "-np", "1"]) == 0
    assert "2 of 3 cases are finished already" in capsys.readouterr().out
    after = {p.name: p.stat().st_mtime_ns for p in store_of(folders).glob("*.b2nd")}
    assert {name for name in after if after[name] != before[name]} == {"case1.b2nd"}


def test_one_and_two_processes_write_identical_stores(folders):
    nnunet_dataset(folders["nnssl_raw"])
    plan_and_preprocess.main(["-d", "801", "-c", "onemmiso", *FAST])
    store = store_of(folders, configuration="onemmiso")
    single = hashes(store)
    for file in store.iterdir():
        file.unlink()
    assert preprocess.main(["-d", "801", "-c", "onemmiso", "-np", "2"]) == 0
    assert hashes(store) == single


def test_bad_cases_are_listed_with_exit_code_1_and_the_others_are_done(folders, capsys):
    raw = nnunet_dataset(folders["nnssl_raw"], cases=6)
    images = raw / "imagesTr"
    content = (images / "case1_0000.nii.gz").read_bytes()
    (images / "case1_0000.nii.gz").write_bytes(content[: len(content) // 2])
    write_image(images / "case2_0000.nii.gz", body_volume()[4])
    broken = body_volume().astype(np.float32)
    broken[0, 0, 0] = np.nan
    write_image(images / "case3_0000.nii.gz", broken)
    assert plan_and_preprocess.main(["-d", "801", *FAST]) == 1
    out = capsys.readouterr().out
    for case, reason in (("case1", "truncated"), ("case2", "2D"), ("case3", "NaN")):
        assert any(line.startswith(f"failed: {case}:") and reason in line for line in out.splitlines())
    assert CaseStore(store_of(folders)).identifiers == ["case0", "case4", "case5"]
    assert set(json.loads((store_of(folders).parent / "dataset_fingerprint.json").read_text())["failed"]) == {"case1", "case2", "case3"}


def test_a_dataset_without_one_readable_case_ends_with_exit_code_2(folders, capsys):
    raw = nnunet_dataset(folders["nnssl_raw"], cases=1)
    write_image(raw / "imagesTr" / "case0_0000.nii.gz", body_volume()[4])
    assert extract_fingerprint.main(["-d", "801", "-np", "1"]) == 2
    assert "no case of Dataset801_Test could be read" in error_of(capsys)


def test_mistakes_end_with_exit_code_2_and_say_how_to_mend_them(folders, capsys, monkeypatch):
    nnunet_dataset(folders["nnssl_raw"])
    (folders["nnssl_raw"] / "Dataset805_Empty").mkdir()
    assert extract_fingerprint.main(["-d", "999"]) == 2
    assert "unknown dataset ID 999" in error_of(capsys)
    assert extract_fingerprint.main(["-d", "805"]) == 2
    assert "neither pretrain_data.json nor dataset.json" in error_of(capsys)
    assert plan_experiment.main(["-d", "801"]) == 2
    assert "nnssl_extract_fingerprint -d" in error_of(capsys)
    assert preprocess.main(["-d", "801"]) == 2
    assert "nnssl_plan_experiment -d 801" in error_of(capsys)
    assert extract_fingerprint.main(["-d", "801", "-np", "1"]) == 0
    assert plan_experiment.main(["-d", "801", "-pl", "Planer"]) == 2
    assert "did you mean 'Planner'" in error_of(capsys)
    assert plan_experiment.main(["-d", "801", "-gpu_memory_target", "0.5"]) == 0
    assert preprocess.main(["-d", "801", "-c", "3d_fulres"]) == 2
    assert "did you mean '3d_fullres'" in error_of(capsys)
    monkeypatch.delenv("nnssl_raw")
    assert preprocess.main(["-d", "801"]) == 2
    assert "nnssl_raw is not set" in error_of(capsys)


def test_a_full_disk_ends_with_exit_code_2_and_keeps_what_was_written(folders, capsys, monkeypatch):
    nnunet_dataset(folders["nnssl_raw"])
    extract_fingerprint.main(["-d", "801", "-np", "1"])
    plan_experiment.main(["-d", "801", "-gpu_memory_target", "0.5"])
    replace, written = os.replace, []

    def fill_up(source, target):
        if len(written) >= 3:  # array and JSON of the first case, array of the second
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(target)
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", fill_up)
    capsys.readouterr()
    assert preprocess.main(["-d", "801", "-np", "1"]) == 2
    assert "the disk is full" in error_of(capsys)
    monkeypatch.undo()
    for name, path in folders.items():
        monkeypatch.setenv(name, str(path))
    store = CaseStore(store_of(folders))
    assert store.identifiers == ["case0"]
    store.verify(0)
    assert not list(store.folder.glob(".*.tmp"))
    assert preprocess.main(["-d", "801", "-np", "1"]) == 0
    assert len(CaseStore(store_of(folders))) == 3


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_leaves_nothing_half_written(call, number, folders, capsys, monkeypatch):
    nnunet_dataset(folders["nnssl_raw"], cases=2)
    plan_and_preprocess.main(["-d", "801", *FAST])
    for file in store_of(folders).iterdir():
        file.unlink()

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, call, fail)
    capsys.readouterr()
    assert preprocess.main(["-d", "801", "-np", "1"]) == 2
    assert "could not write" in error_of(capsys)
    assert list(store_of(folders).iterdir()) == []


def test_a_disk_that_is_full_from_the_start_leaves_no_lock(folders, capsys, monkeypatch):
    nnunet_dataset(folders["nnssl_raw"])

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.json, "dump", fail)
    assert extract_fingerprint.main(["-d", "801", "-np", "1"]) == 2
    assert "the disk is full" in error_of(capsys)
    assert list((folders["nnssl_preprocessed"] / "Dataset801_Test").iterdir()) == []


def test_a_file_in_place_of_a_folder_is_named(folders, capsys, monkeypatch):
    nnunet_dataset(folders["nnssl_raw"])
    (folders["nnssl_results"] / "file").write_text("")
    monkeypatch.setenv("nnssl_preprocessed", str(folders["nnssl_results"] / "file"))
    assert extract_fingerprint.main(["-d", "801", "-np", "1"]) == 2
    assert "the folder can't be used: Not a directory" in error_of(capsys)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_disk_that_fills_up_inside_a_file_leaves_nothing_half_written(processes, folders):
    nnunet_dataset(folders["nnssl_raw"], cases=3)
    plan_and_preprocess.main(["-d", "801", *FAST])
    arrays = [file.stat().st_size for file in store_of(folders).glob("*.b2nd")]
    for file in store_of(folders).iterdir():
        file.unlink()
    limited = (  # a limit of file size stands in for a full disk; its error number is handed on as that of a full disk
        "import errno, resource, signal, sys; from nnssl_ext.core import files; from nnssl_ext.cli import preprocess\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({min(arrays) // 2}, resource.RLIM_INFINITY)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "files._DISK_ERRORS[errno.EFBIG] = 'the disk is full'\n"
        f"if __name__ == '__main__': sys.exit(preprocess.main(['-d', '801', '-np', '{processes}']))\n"
    )
    script = folders["nnssl_raw"] / "limited.py"
    script.write_text(limited)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "the disk is full" in ended.stderr and len(ended.stderr.strip().splitlines()) <= 3, ended.stderr
    assert [file for file in store_of(folders).iterdir() if not file.name.startswith(".lock")] == []


def test_cases_that_left_the_raw_dataset_are_named(folders, capsys):
    raw = nnunet_dataset(folders["nnssl_raw"])
    plan_and_preprocess.main(["-d", "801", *FAST])
    (raw / "imagesTr" / "case1_0000.nii.gz").unlink()
    capsys.readouterr()
    assert preprocess.main(["-d", "801", "-np", "1"]) == 0
    assert "1 stored cases are not in the raw dataset and stay in the store: case1" in capsys.readouterr().out


def test_a_landmark_keeps_its_place_in_the_world(folders):
    """A bright ball's centre of mass, in mm, before and after cropping, normalisation and resampling of an oblique volume."""
    shape, centre, spacing, angle = (48, 40, 44), (21.0, 17.0, 26.0), (2.0, 1.5, 1.5), 0.3
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    distance = np.sqrt(sum(((g - c) * s) ** 2 for g, c, s in zip((z, y, x), centre, spacing)))
    body = np.where(sum(((g - n / 2) / (0.4 * n)) ** 2 for g, n in zip((z, y, x), shape)) < 1, 0.0, -1000.0)
    image = SimpleITK.GetImageFromArray((body + 300 * np.exp(-((distance / 6) ** 2)) * (body == 0)).astype(np.int16))
    image.SetSpacing(spacing[::-1])
    image.SetOrigin((5, -60, 12))
    image.SetDirection((np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle), 0, 0, 0, 1))
    folder = nnunet_dataset(folders["nnssl_raw"], cases=1)
    SimpleITK.WriteImage(image, str(folder / "imagesTr" / "case0_0000.nii.gz"))
    assert plan_and_preprocess.main(["-d", "801", "-c", "onemmiso", *FAST]) == 0
    store = CaseStore(store_of(folders, configuration="onemmiso"))
    parameters = store.info(0)["normalization"][0]
    bright = np.clip(store.read(0)[0] * parameters["scale"] + parameters["shift"] - 50, 0, None)
    grids = np.meshgrid(*(np.arange(n) for n in store.shape(0)), indexing="ij")
    found = store.geometry(0).to_world([float((bright * g).sum() / bright.sum()) for g in grids])
    assert found == pytest.approx(image.TransformContinuousIndexToPhysicalPoint(centre[::-1]), abs=0.1)


def test_a_store_in_use_is_refused(folders, capsys):
    nnunet_dataset(folders["nnssl_raw"])
    plan_and_preprocess.main(["-d", "801", *FAST])
    capsys.readouterr()
    with files.FolderLock(store_of(folders)):
        assert preprocess.main(["-d", "801", "-np", "1"]) == 2
    assert "in use by process" in error_of(capsys)
