"""nnssl_doctor finds what is wrong, and says how to mend it."""

import importlib.metadata
import json
import shutil

import pytest

from nnssl_ext.cli import doctor as command
from nnssl_ext.evaluation import doctor, self_test
from nnssl_ext.evaluation.doctor import folder_finding, usable_cores, worst


@pytest.fixture
def machine(folders, monkeypatch):
    """All folders set."""
    for name in doctor.NNUNET_FOLDERS:
        monkeypatch.setenv(name, str(folders["nnssl_raw"]))
    return folders


def findings(capsys):
    assert command.main(["--json", "--quick"]) in (0, 1)
    return {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}


def test_a_good_machine_has_no_problem(machine, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_packages", lambda: iter(()))
    monkeypatch.setattr(doctor, "_graphics", lambda: iter(()))
    assert command.main(["--quick"]) == 0
    out = capsys.readouterr().out
    assert "0 problems" in out and "nnssl_raw" in out and "shared memory" in out


def test_everything_but_ok_comes_with_a_remedy(machine, capsys, monkeypatch):
    monkeypatch.delenv("nnssl_results")
    monkeypatch.setenv("nnssl_raw", "/nowhere")
    found = findings(capsys)
    assert found["nnssl_results"]["state"] == found["nnssl_raw"]["state"] == "problem" and "mkdir" in found["nnssl_raw"]["fix"]
    assert all(entry["state"] == "ok" or entry["fix"] for entry in found.values())
    assert command.main(["--quick"]) == 1


def test_missing_and_old_packages_are_problems(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=99", "nosuchpackage>=1", "numpy>=1", 'h5py>=99; extra == "hdf5"'])
    found = list(doctor._packages())
    assert [finding.state for finding in found] == ["problem", "problem", "ok"]
    assert ">=99 is needed" in found[0].text and found[1].fix == "pip install 'nosuchpackage>=1'"


@pytest.mark.parametrize(
    ("variable", "free", "writable", "state"),
    [
        ("nnssl_results", 100e9, True, "ok"),
        ("nnssl_results", 1e9, True, "warning"),
        ("nnssl_results", 100e9, False, "problem"),
        ("nnssl_raw", 1e9, False, "ok"),
    ],
)
def test_folders_need_room_and_rights(variable, free, writable, state, tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2 * free, free, free))
    if not writable:
        monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    assert folder_finding(variable, str(tmp_path)).state == state


def test_folders_that_are_not_set_stop_our_commands_but_not_those_of_nnunet():
    assert folder_finding("nnssl_raw", "").state == "problem" and folder_finding("nnUNet_raw", "").state == "warning"


def test_the_quota_of_a_container_counts(tmp_path):
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path / "cpu.max") == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path / "cpu.max") == usable_cores(tmp_path / "none") >= 1


def test_a_check_that_fails_itself_is_told(monkeypatch):
    def _python():
        raise OSError("odd machine")

    monkeypatch.setattr(doctor, "_python", _python)
    first = next(doctor.examine(self_test=False))
    assert first.state == "problem" and "odd machine" in first.text and worst([first]) == "problem"


def test_the_tiny_training_works_and_leaves_nothing_behind(monkeypatch, capsys):
    monkeypatch.setenv("nnssl_sinks", "wandb")  # of the user's runs
    assert "3 steps of MAETrainer" in self_test.train_a_little("cpu")
    assert capsys.readouterr().out == ""


def test_a_training_that_fails_is_a_problem(monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(doctor, "train_a_little", broken)
    (finding,) = doctor._self_tests()
    assert finding.state == "problem" and "no kernel image" in finding.text and finding.fix
