"""nnssl_train -probe as a user runs it, from raw volumes."""

import json
import shlex

import pytest

from nnssl_ext.cli import preprocess, train
from tests.make_data import tiny_plan
from tests.make_raw import labelled_dataset, nnunet_dataset

SHORT = ["801", "3d_fullres", "-device", "cpu", "-o", "epochs=2", "iterations=1", "batch_size=1", "workers=0"]


@pytest.fixture
def run(folders, monkeypatch):
    """Folder of the run that `SHORT` trains; the labelled dataset 901 lies in nnssl_raw."""
    monkeypatch.setenv("nnssl_sinks", "none")
    nnunet_dataset(folders["nnssl_raw"])
    labelled_dataset(folders["nnssl_raw"])
    tiny_plan().save(folders["nnssl_preprocessed"] / "Dataset801_Test" / "nnsslPlans.json")
    assert preprocess.main(["-d", "801", "-c", "3d_fullres", "-np", "1"]) == 0
    return folders["nnssl_results"] / "Dataset801_Test" / "MAETrainer__nnsslPlans__3d_fullres__epochs=2_iterations=1_batch_size=1" / "fold_all"


def test_the_figures_of_the_probe_are_recorded_shown_and_repeated_by_the_command(run, capsys):
    assert train.main(["-probe", "901", *SHORT]) == 0
    out = capsys.readouterr().out
    assert "probe: 2 training and 1 test cases of Dataset901_Labelled" in out and out.count("probe/knn_dice 0.") == 2
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        assert 0 < json.loads(line)["probe/knn_dice"] <= 1 and 0 < json.loads(line)["probe/linear_dice"] <= 1
    page, settings = (run / "index.html").read_text(encoding="utf-8"), json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert "Probe of the frozen features" in page and "knn_dice" in page
    assert settings["command"] in page and train.arguments().parse_args(shlex.split(settings["command"])[1:]).probe == "901"


def test_two_processes_probe_once(run):
    assert train.main(["-probe", "901", "-num_gpus", "2", *SHORT]) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(records) == 2 and all(0 < record["probe/knn_dice"] <= 1 for record in records)


@pytest.mark.parametrize("processes", [[], ["-num_gpus", "2"]])
def test_a_dataset_that_cannot_be_probed_with_ends_the_command_before_anything_is_trained(processes, run, capfd):
    assert train.main(["-probe", "902", *processes, *SHORT]) == 2
    error = capfd.readouterr().err
    assert "error: unknown dataset ID 902" in error and error.count("error:") == 1
    assert not (run / "metrics.jsonl").exists() and not list(run.glob("*.pth"))
