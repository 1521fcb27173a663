"""nnssl_benchmark from nothing to its results, with a suite of the smallest size."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from nnssl_ext.benchmark import lanes
from nnssl_ext.benchmark.units import RECORD
from nnssl_ext.cli.benchmark import main
from nnssl_ext.core.files import read_json
from nnssl_ext.evaluation.demo_data import write_dataset_802, write_dataset_902
from nnssl_ext.finetuning.trainers import EPOCHS_VARIABLE, ITERATIONS_VARIABLE

MAE = {"trainer": "MAETrainer", "family": "primus", "steps": 2, "batch": 2}
SUITE = {
    "name": "tiny",
    "generator": {"unlabelled": 6, "labelled": 3, "test": 2, "lesions": 8, "pairs": 1, "size": 32, "spacing": 6.0},
    "network": {"size": "nano", "patch": 16},
    "seeds": 1,
    "methods": [MAE],
    "finetuning": [{"mode": "full", "labels": [2]}, {"mode": "frozen", "labels": [2]}],
    "quick": {"primus": {"epochs": 1, "iterations": 2, "batch": 2}},
    "probe": [2],
    "registration": {"preset": "dinoreg", "iterations": 2},
    "negative_control": {**MAE, "noise": True},
}


@pytest.fixture
def no_page(monkeypatch):
    """The page is tested by itself."""
    module = ModuleType("nnssl_ext.benchmark.report")
    module.write_report = lambda out: out / "report.html"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())


@pytest.mark.slow
@pytest.mark.nnunet
def test_a_suite_goes_from_nothing_to_results_and_a_second_run_computes_nothing(tmp_path, no_page, monkeypatch, capsys):
    file, out, kept = tmp_path / "suite.yaml", tmp_path / "out", tmp_path / "expected.json"
    file.write_text(yaml.safe_dump(SUITE))
    command = ["--suite", str(file), "-out", str(out), "-lanes", "2"]
    assert main([*command, "--write-expected", str(kept)]) == 0, capsys.readouterr()
    results = read_json(out / "results.json")
    found = {(run["kind"], run["method"], run["role"], run["mode"], run["labels"]) for run in results["runs"]}
    assert found == {
        ("pretrain", "MAETrainer", "method", None, None),
        ("pretrain", "MAETrainer on noise", "negative control", None, None),
        ("segmentation", "MAETrainer", "method", "full", 2),
        ("segmentation", "MAETrainer", "method", "frozen", 2),
        ("segmentation", "MAETrainer on noise", "negative control", "full", 2),
        ("segmentation", "scratch", "baseline", "full", 2),
        ("segmentation", "random weights", "baseline", "frozen", 2),
        ("segmentation", "scratch", "upper bound", "full", 3),
        *(("probe", name, role, None, 2) for name, role in BASED),
        *(("classification", name, role, None, None) for name, role in BASED),
        *(("registration", name, role, None, None) for name, role in (*BASED, ("MIND", "baseline"), ("initial", "baseline"))),
    }
    for run in results["runs"]:
        assert (out / run["record"]).is_file() and all((out / picture).is_file() for picture in run["pictures"].values())
    segmented = [run for run in results["runs"] if run["kind"] == "segmentation"]
    assert all(set(run["cases"]) == {"phantom_test_0000", "phantom_test_0001"} and run["pictures"] and run["curves"] for run in segmented)
    losses = {
        run["method"]: run["curves"]["train/total"] for run in segmented if run["mode"] == "full" and run["labels"] == 2 and run["role"] != "negative control"
    }
    assert losses["scratch"] != losses["MAETrainer"]

    monkeypatch.setattr(lanes, "ProcessPoolExecutor", None)  # nobody may compute anything
    with pytest.raises(TypeError):
        record = next((out / "units").glob("probe_MAETrainer*")) / RECORD
        text = record.read_text()
        record.unlink()
        main([*command, "--verbose"])
    record.write_text(text)
    assert main([*command, "--check", str(kept)]) == 0
    said = capsys.readouterr().out
    assert "all of them are finished" in said and "all numbers are the expected ones, to the digit" in said
    assert read_json(out / "results.json") == {**results, "command": read_json(out / "results.json")["command"]}
    monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.nnunet
def test_datasets_of_the_user_are_fine_tuned_by_nnunets_own_commands(tmp_path, monkeypatch, capsys):
    for name in ("nnssl_raw", "nnssl_preprocessed", "nnUNet_raw"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name, value in {EPOCHS_VARIABLE: "1", ITERATIONS_VARIABLE: "2", "PYTHONPATH": os.getcwd()}.items():
        monkeypatch.setenv(name, value)
    write_dataset_802(tmp_path / "nnssl_raw", 4, size=32, spacing=6.0, modalities=("CT",))
    write_dataset_902(tmp_path / "nnUNet_raw", 3, 1, size=32, spacing=6.0)
    out = tmp_path / "out"
    command = ["802", "902", "-b", "primus", "-o", "epochs=1", "iterations=2", "batch_size=2", "workers=0", "-seeds", "1", "-n", "2", "-mode", "full"]
    command += ["-schedule", "short", "-device", "cpu", "-lanes", "2", "-out", str(out)]
    assert main(command) == 0, capsys.readouterr()
    results = read_json(out / "results.json")
    assert results["suite"]["schedule"] == "short" and results["suite"]["quick"] is None
    segmented = {(run["method"], run["role"], run["labels"]): run for run in results["runs"] if run["kind"] == "segmentation"}
    assert segmented.keys() == {("MAETrainer", "method", 2), ("scratch", "baseline", 2), ("scratch", "upper bound", 3)}
    for run in segmented.values():
        assert set(run["cases"]) == {"phantom_test_0000"} and all((out / picture).is_file() for picture in run["pictures"].values())
    for unit in (out / "units").glob("finetune_*"):
        if unit.is_dir():
            settings, said = read_json(unit / RECORD)["identity"]["settings"], (unit / "log.txt").read_text()
            assert settings["trainer"] == "nnsslPrimusTrainer_short" and settings["variables"] == {EPOCHS_VARIABLE: "1", ITERATIONS_VARIABLE: "2"}
            assert "$ nnUNetv2_train" in said and ("-pretrained_weights" in said) == unit.name.startswith("finetune_MAETrainer")
            assert ("labelled cases for training: 2 of 3" in said) == (settings["labels"] == 2)
    assert (out / "report.html").is_file() and main(command) == 0 and "all of them are finished" in capsys.readouterr().out


BASED = (("MAETrainer", "method"), ("random weights", "baseline"), ("raw intensities", "baseline"))


def test_what_can_be_told_at_once_is_an_error_of_the_user(tmp_path, no_page, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    file = tmp_path / "suite.yaml"
    file.write_text(json.dumps({**SUITE, "methods": [{**MAE, "trainer": "MAETrainr"}]}))
    out = ["-out", str(tmp_path / "out")]
    wrong = {
        "did you mean 'MAETrainer'": ["--suite", str(file)],
        "an unlabelled and at least one labelled dataset are needed": ["802"],
        "both dataset IDs and a suite are given": ["802", "902", "--suite", str(file)],
        "a suite says itself what -seeds would say": ["--suite", str(file), "-seeds", "5"],
        "did you mean 'resenc'": ["802", "902", "-n", "2", "-b", "resnc"],
        "DINOv2Trainer can use none of resenc": ["802", "902", "-n", "2", "-tr", "DINOv2Trainer", "-b", "resenc"],
        "is not of the form key=value": ["802", "902", "-n", "2", "-o", "lr"],
        "unknown dataset ID 902": ["802", "902"],
        "there is no trainer 'nnsslResEncTrainer_15ep' for the schedule '15ep'": ["802", "902", "-n", "2", "-schedule", "15ep"],
        "quick fine-tuning has a schedule of its own": ["802", "902", "-n", "2", "-schedule", "150ep", "--quick"],
        "there is no mode adapter for resenc": ["802", "902", "-n", "2", "-mode", "adapter"],
    }
    for message, words in wrong.items():
        assert main([*words, *out]) == 2
        assert message in capsys.readouterr().err
    assert not Path(tmp_path / "out" / "units").exists()
