"""The examples in the plug-in folders work, each through the commands that a user types."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_ext.cli import extract_fingerprint, plan_experiment, preprocess, train
from nnssl_ext.core.plan import Normalization, Plan
from nnssl_ext.core.registry import find_class
from nnssl_ext.planners.planner import Planner
from nnssl_ext.preprocessing.normalize import Normalizer, find_normalizer
from nnssl_ext.trainers.base import SSLTrainer
from nnssl_ext.trainers.checkpoint import load_checkpoint
from tests.make_data import make_fingerprint

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / name for name in ("preprocessing", "planners", "trainers")]


@pytest.fixture(autouse=True)
def _plugins(monkeypatch):
    monkeypatch.setenv("nnssl_extPath", os.pathsep.join(map(str, FOLDERS)))


@pytest.fixture
def preprocessed(folders):
    """A dataset of four small volumes with outliers: planned by HalfCasePlanner, normalised by RobustZScore."""
    raw = folders["nnssl_raw"] / "Dataset801_Plugins"
    (raw / "imagesTr").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(4):
        volume = rng.normal(100 + index, 10, (40, 40, 40)).astype(np.float32)
        volume[:4] = -20
        volume[20, 20, 20] = 1e5
        sitk.WriteImage(sitk.GetImageFromArray(volume), raw / "imagesTr" / f"case{index}_0000.nii.gz")
    (raw / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1w"}, "labels": {"background": 0}, "numTraining": 4, "file_ending": ".nii.gz"}))
    assert extract_fingerprint.main(["-d", "801", "-np", "1"]) == 0
    assert plan_experiment.main(["-d", "801", "-pl", "HalfCasePlanner", "-gpu_memory_target", "1"]) == 0
    folder = folders["nnssl_preprocessed"] / "Dataset801_Plugins"
    content = json.loads((folder / "nnsslPlans.json").read_text())
    for configuration in content["configurations"].values():
        configuration["normalization"]["T1w"]["scheme"] = "RobustZScore"
    Plan.from_dict(content).save(folder / "nnsslPlans.json")
    assert preprocess.main(["-d", "801", "-c", "3d_fullres", "-np", "1"]) == 0
    return folder


@pytest.mark.parametrize(
    ("name", "base", "package"),
    [
        ("RobustZScore", Normalizer, "nnssl_ext.preprocessing"),
        ("HalfCasePlanner", Planner, "nnssl_ext.planners"),
        ("DenoisingTrainer", SSLTrainer, "nnssl_ext.trainers"),
    ],
)
def test_each_example_is_found_by_name(name, base, package):
    assert issubclass(find_class(name, base, package), base)


def test_the_normalisation_ignores_outliers():
    rng = np.random.default_rng(0)
    volume = rng.normal(50, 4, (20, 20, 20)).astype(np.float32)
    volume[0, 0, :5] = 1e6
    normalizer = find_normalizer("RobustZScore")
    parameters = normalizer.parameters(volume, np.ones(volume.shape, bool), Normalization("RobustZScore"))
    assert parameters["shift"] == pytest.approx(50, abs=0.2)
    assert parameters["scale"] == pytest.approx(4, rel=0.05)
    normalized = normalizer.apply(volume, parameters)
    assert np.allclose(normalizer.invert(normalized, parameters), volume, rtol=1e-5)


def test_the_normalisation_of_a_constant_volume_is_finite():
    volume = np.full((4, 4, 4), 7, np.float32)
    normalizer = find_normalizer("RobustZScore")
    assert not normalizer.apply(volume, normalizer.parameters(volume, volume > 0, Normalization("x"))).any()


def test_the_planner_halves_the_patch_and_says_so():
    fingerprint = make_fingerprint(shapes=((64, 96, 128),) * 8, spacings=((1.0, 1.0, 1.0),) * 8)
    plan = find_class("HalfCasePlanner", Planner, "nnssl_ext.planners")(fingerprint, 24.0).plan("nnsslPlans")
    usual = Planner(fingerprint, 24.0).plan("nnsslPlans")
    assert plan.configurations["3d_fullres"].patch_size == (32, 48, 64)
    assert usual.configurations["3d_fullres"].patch_size == (64, 96, 128)
    assert plan.planner == "HalfCasePlanner"
    assert any("half of the median case" in sentence for sentence in plan.decisions)


def test_planning_preprocessing_and_training_work_with_all_three_examples(preprocessed, folders):
    plan = Plan.load(preprocessed / "nnsslPlans.json")
    assert plan.planner == "HalfCasePlanner"
    info = json.loads((preprocessed / plan.configuration("3d_fullres").data_identifier / "case0.json").read_text())
    applied = info["normalization"][0]
    assert applied["scheme"] == "RobustZScore"
    assert applied["shift"] == pytest.approx(100, abs=3)
    options = ["-tr", "DenoisingTrainer", "-device", "cpu", "-o", "epochs=1", "iterations=2", "batch_size=2", "workers=0", "noise=0.25"]
    assert train.main(["801", "3d_fullres", *options]) == 0
    checkpoint = load_checkpoint(next(folders["nnssl_results"].rglob("checkpoint_final.pth")))
    assert checkpoint["trainer_name"] == "DenoisingTrainer"


def test_an_unknown_hyper_parameter_of_the_example_gets_the_closest_one(preprocessed, capsys):
    assert train.main(["801", "3d_fullres", "-tr", "DenoisingTrainer", "-o", "noize=1"]) == 2
    assert "did you mean 'noise'?" in capsys.readouterr().err
