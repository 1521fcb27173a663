"""nnssl_verify as a user runs it: verdicts, the page, interruptions, growth, stores."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nnssl_ext.cli import extract_fingerprint, plan_and_preprocess, verify
from nnssl_ext.evaluation.phantom import make_phantom
from nnssl_ext.planners import fingerprint
from tests.make_raw import body_volume, nnunet_dataset, pretrain_dataset, write_image

ROOT = Path(__file__).parents[2]
WRITTEN = ("dataset_fingerprint.json", "integrity.json", "pretrain_data.json")


def written(folder):
    return {name: (folder / name).read_bytes() for name in WRITTEN}


def add(raw, name, array, **options):
    return write_image(raw / "imagesTr" / f"{name}_0000.nii.gz", array, **options)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def count_reads(monkeypatch):
    """Names of the cases whose voxels are read from now on."""
    names, describe = [], fingerprint._describe
    monkeypatch.setattr(fingerprint, "_describe", lambda case, samples: names.append(case.identifier) or describe(case, samples))
    return names


def test_a_clean_cohort_is_all_ok(folders, capsys):
    raw = folders["nnssl_raw"] / "Dataset802_Clean"
    lines = ["image,identifier,modality"]
    for index in range(12):
        modality = ("CT", "MR")[index % 2]
        phantom = make_phantom(0, index, modality=modality, shape=(48, 48, 48), spacing=(4.0, 4.0, 4.0))
        write_image(raw / f"case{index:02d}.nii.gz", phantom.image, spacing=phantom.spacing)
        lines.append(f"case{index:02d}.nii.gz,case{index:02d},{modality}")
    (raw / "cases.csv").write_text("\n".join(lines))
    assert verify.main(["-d", "802", "-np", "1"]) == 0
    assert "12 ok, 0 with warnings, 0 quarantined" in capsys.readouterr().out
    content = json.loads((folders["nnssl_preprocessed"] / raw.name / "integrity.json").read_text())
    assert {entry["verdict"] for entry in content["cases"].values()} == {"ok"} and len(content["cases"]) == 12


def test_each_case_gets_its_verdict_and_the_page_shows_it(folders, capsys):
    raw = nnunet_dataset(folders["nnssl_raw"])
    add(raw, "<shifted>", body_volume(index=5) + 1024)
    add(raw, "copy", body_volume(index=1).astype(np.float32))
    cut(add(raw, "cut", body_volume()))
    assert verify.main(["-d", "801", "-np", "1"]) == 1
    folder = folders["nnssl_preprocessed"] / raw.name
    content = json.loads((folder / "integrity.json").read_text())
    found = {name: (entry["verdict"], [finding["kind"] for finding in entry["findings"]]) for name, entry in content["cases"].items()}
    assert found == {
        "case0": ("ok", []),
        "case1": ("warning", ["leak"]),
        "case2": ("ok", []),
        "<shifted>": ("warning", ["hu"]),
        "copy": ("warning", ["leak"]),
        "cut": ("quarantined", ["truncated"]),
    }
    assert content["summary"] == {"ok": 2, "warning": 3, "quarantined": 1}
    fingerprint_cases = json.loads((folder / "dataset_fingerprint.json").read_text())
    assert "cut" not in fingerprint_cases["cases"] and list(fingerprint_cases["failed"]) == ["cut"]
    page = (folder / "integrity.html").read_text(encoding="utf-8")
    assert len(re.findall("data:image/png;base64,", page)) == 3 and "&lt;shifted&gt;" in page and "<shifted>" not in page
    assert not re.search(r"(src|href)=\"(?!data:|#)|url\(|@import|<script", page)
    out = capsys.readouterr().out
    assert "2 ok, 3 with warnings, 1 quarantined" in out and str(folder / "integrity.html") in out


def test_a_dataset_without_a_readable_case_has_a_page_and_no_fingerprint(folders):
    raw = nnunet_dataset(folders["nnssl_raw"], cases=1)
    cut(raw / "imagesTr" / "case0_0000.nii.gz")
    assert verify.main(["-d", "801", "-np", "1"]) == 1
    folder = folders["nnssl_preprocessed"] / raw.name
    assert "truncated" in (folder / "integrity.html").read_text(encoding="utf-8") and not (folder / "dataset_fingerprint.json").exists()


def test_only_headers_are_read_for_a_quick_look(folders, capsys, monkeypatch):
    raw = nnunet_dataset(folders["nnssl_raw"])
    cut(add(raw, "cut", body_volume()))
    add(raw, "slab", body_volume((4, 60, 60)))
    (raw / "imagesTr" / "gone_0000.nii.gz").symlink_to(raw / "nowhere.nii.gz")
    monkeypatch.setattr(fingerprint, "read_case", None)
    assert verify.main(["-d", "801", "-np", "1", "--header_only"]) == 1
    out, folder = capsys.readouterr().out, folders["nnssl_preprocessed"] / raw.name
    assert "4 ok, 1 with warnings, 1 quarantined" in out and "voxels, intensities and duplicates were not checked" in out
    assert sorted(path.name for path in folder.iterdir()) == ["integrity_headers.html"]
    page = (folder / "integrity_headers.html").read_text(encoding="utf-8")
    assert "Not checked" in page and "gone" in page and "slab" in page and "image/png" not in page


def test_fingerprint_and_verify_write_the_same_files(folders):
    pretrain_dataset(folders["nnssl_raw"])
    folder = folders["nnssl_preprocessed"] / "Dataset802_Test"
    assert extract_fingerprint.main(["-d", "802", "-np", "2"]) == 0
    first = written(folder)
    shutil.rmtree(folder)
    assert verify.main(["-d", "802", "-np", "1"]) == 0
    assert written(folder) == first


def test_only_new_changed_and_quarantined_files_are_read_again(folders, monkeypatch):
    raw = nnunet_dataset(folders["nnssl_raw"], cases=4)
    folder = folders["nnssl_preprocessed"] / raw.name
    cut(raw / "imagesTr" / "case3_0000.nii.gz")
    verify.main(["-d", "801", "-np", "1"])
    names = count_reads(monkeypatch)
    verify.main(["-d", "801", "-np", "1"])
    assert names == ["case3"]
    names.clear()
    add(raw, "case1", body_volume(index=7))
    add(raw, "new", body_volume(index=8))
    add(raw, "case3", body_volume(index=3))
    (raw / "imagesTr" / "case0_0000.nii.gz").unlink()
    assert verify.main(["-d", "801", "-np", "1"]) == 0
    assert sorted(names) == ["case1", "case3", "new"]
    grown = written(folder)
    shutil.rmtree(folder)
    verify.main(["-d", "801", "-np", "1"])
    assert written(folder) == grown


def test_a_file_of_the_same_size_that_was_written_again_is_read_again(folders, monkeypatch):
    raw = nnunet_dataset(folders["nnssl_raw"], cases=2)
    verify.main(["-d", "801", "-np", "1"])
    file = raw / "imagesTr" / "case1_0000.nii.gz"
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 1_000_000))
    names = count_reads(monkeypatch)
    verify.main(["-d", "801", "-np", "1"])
    assert names == ["case1"]


def test_a_changed_modality_is_judged_again(folders):
    raw = nnunet_dataset(folders["nnssl_raw"])
    verify.main(["-d", "801", "-np", "1"])
    description = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**description, "channel_names": {"0": "MR"}}))
    verify.main(["-d", "801", "-np", "1"])
    content = json.loads((folders["nnssl_preprocessed"] / raw.name / "integrity.json").read_text())
    assert {finding["kind"] for entry in content["cases"].values() for finding in entry["findings"]} == {"negative"}


@pytest.mark.crash
def test_a_pass_that_is_killed_again_and_again_ends_with_the_same_files(folders):
    raw = nnunet_dataset(folders["nnssl_raw"], cases=30)
    cut(raw / "imagesTr" / "case7_0000.nii.gz")
    folder = folders["nnssl_preprocessed"] / raw.name
    assert verify.main(["-d", "801", "-np", "1"]) == 1
    expected = written(folder)
    shutil.rmtree(folder)
    command = [sys.executable, "-c", "from nnssl_ext.cli.verify import main; main(['-d', '801', '-np', '1'])"]
    chance, known = random.Random(0), []
    for _ in range(4):
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, deadline = journal_bytes(folder), time.monotonic() + 60
        while journal_bytes(folder) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        known.append(len({record["name"] for record in fingerprint.journal.records(folder / fingerprint.CACHE) if "error" not in record}))
    assert known == sorted(known) and known[0] < 29, known  # killed in the middle, and nothing was lost
    assert verify.main(["-d", "801", "-np", "2"]) == 1
    assert written(folder) == expected


def journal_bytes(folder):
    return sum(file.stat().st_size for file in (folder / fingerprint.CACHE).glob("*.jsonl"))


def test_damaged_files_of_a_store_are_listed(folders, capsys):
    nnunet_dataset(folders["nnssl_raw"])
    plan_and_preprocess.main(["-d", "801", "-np", "1", "-gpu_memory_target", "0.5"])
    assert verify.main(["-d", "801", "--store", "-np", "2"]) == 0
    store = folders["nnssl_preprocessed"] / "Dataset801_Test" / "nnsslPlans_3d_fullres"
    content = bytearray((store / "case1.b2nd").read_bytes())
    content[len(content) // 2] ^= 1
    (store / "case1.b2nd").write_bytes(content)
    capsys.readouterr()
    assert verify.main(["-d", "801", "--store", "-np", "1"]) == 1
    out = capsys.readouterr().out
    assert "failed: case1: a stored case is damaged" in out and "fix: " in out and "case0" not in out


@pytest.mark.parametrize("options", [["-d", "805"], ["-d", "801", "--store"], ["-d", "801", "--store", "-p", "other"]])
def test_a_mistake_ends_with_exit_code_2(options, folders, capsys):
    (folders["nnssl_preprocessed"] / "Dataset801_Test").mkdir()
    assert verify.main([*options, "-np", "1"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) <= 3
