"""Every way of fine-tuning on every kind of network, trained by nnU-Net's own console programs in processes of their own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from nnssl_ext.cli import finetune
from nnssl_ext.cli.export import MODES
from nnssl_ext.finetuning.plans import FREEZING
from nnssl_ext.finetuning.pretrained import Pretrained
from tests.make_data import tiny_plan
from tests.make_nnunet import make_checkpoint, make_dataset, make_roots

pytestmark = pytest.mark.nnunet
TRAINERS = {"resenc": "RecordingResEncTrainer", "primus": "RecordingPrimusTrainer", "segformer3d": "RecordingSegFormerTrainer"}
ALWAYS = {("primus", "adapter"), ("resenc", "frozen")}  # the others are slow
MATRIX = [
    pytest.param(family, mode, marks=() if (family, mode) in ALWAYS else pytest.mark.slow)
    for family in TRAINERS
    for mode in MODES
    if mode != "adapter" or family == "primus"
]


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """nnU-Net's folders with a dataset without test images; the first training preprocesses it for all."""
    with pytest.MonkeyPatch.context() as patch:
        found = make_roots(tmp_path_factory.mktemp("nnunet"), patch)
        dataset = make_dataset(found, 901)
        for part in ("imagesTs", "labelsTs"):
            shutil.rmtree(found["nnUNet_raw"] / dataset / part)
        yield found


@pytest.mark.parametrize(("family", "mode"), MATRIX)
def test_training_begins_with_the_pretrained_tensors_and_leaves_frozen_ones_bitwise(roots, tmp_path, monkeypatch, capfd, family, mode):
    for variable, path in roots.items():
        monkeypatch.setenv(variable, str(path))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(__file__).parents[1] / "recording_trainers"))
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setenv("nnssl_finetune_epochs", "1")
    monkeypatch.setenv("nnssl_finetune_iterations", "3")
    transfer = "encoder" if family == "primus" else "encoder+decoder"
    pretrained = Pretrained.load(make_checkpoint(tmp_path / "c.pth", family, plan=tiny_plan(), transfer=transfer))
    given = ["-ckpt", str(pretrained.path), "-d", "901", "-mode", mode, "-tr", TRAINERS[family], "-device", "cpu", "-np", "1"]
    assert finetune.main([*given, "-out", str(tmp_path)]) == 0, capfd.readouterr().err[-3000:]

    (fold,) = (tmp_path / "results").glob("Dataset901_Tiny/*/fold_0")
    before = torch.load(fold / "before_the_first_step.pth", weights_only=True)
    after = torch.load(fold / "checkpoint_final.pth", weights_only=False)["network_weights"]
    handed = pretrained.weights if mode == "full" else pretrained.encoder().weights
    assert handed and all(torch.equal(before[key], value) for key, value in handed.items())
    untouched = {key for key in before if torch.equal(before[key], after[key])}
    if mode in FREEZING:
        assert untouched >= handed.keys() and before.keys() - untouched
    else:
        assert not untouched & {key for key in handed if key.endswith("weight")}
    assert (fold / "validation/summary.json").is_file()
