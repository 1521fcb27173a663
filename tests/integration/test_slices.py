"""The configuration 2d from raw volumes to a network of stock nnU-Net."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

from nnssl_ext.cli import export, features, plan_and_preprocess, preprocess, train
from nnssl_ext.core.plan import Plan
from nnssl_ext.finetuning import export as export_module
from nnssl_ext.finetuning.commands import hand_off
from nnssl_ext.finetuning.export import Target, export_nnunet, load_into_modules
from nnssl_ext.finetuning.plans import PlanOptions, write_plans
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.preprocessing.resample import resample
from nnssl_ext.preprocessing.store import CaseStore
from tests.make_nnunet import make_checkpoint, make_dataset, make_roots, write_fingerprint
from tests.make_raw import body_volume, write_image

pytestmark = pytest.mark.nnunet
SPACINGS = ((6.0, 2.0, 2.0), (4.0, 2.0, 2.0), (9.0, 3.0, 3.0), (6.0, 2.0, 2.0))  # of the cases
SHORT = ["-device", "cpu", "-o", "epochs=1", "iterations=2", "batch_size=2", "workers=0"]


def error_of(capsys) -> str:
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ") and len(text.splitlines()) <= 3
    return text


@pytest.fixture
def raw(folders):
    """A dataset of four volumes whose slices have different distances and, in one, larger pixels."""
    folder = folders["nnssl_raw"] / "Dataset801_Test"
    for index, spacing in enumerate(SPACINGS):
        write_image(folder / "imagesTr" / f"case{index}_0000.nii.gz", body_volume(index=index), spacing)
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "labels": {"background": 0}}))
    return folder


@pytest.fixture
def roots(tmp_path, monkeypatch):
    return make_roots(tmp_path / "nnunet", monkeypatch)


def test_slices_are_planned_stored_trained_on_looked_at_and_handed_to_nnunet(raw, folders, roots, tmp_path, capsys):
    assert plan_and_preprocess.main(["-d", "801", "-c", "2d", "-gpu_memory_target", "0.5", "-np", "1"]) == 0
    plan = Plan.load(folders["nnssl_preprocessed"] / "Dataset801_Test" / "nnsslPlans.json")
    config = plan.configuration("2d")
    assert config.spacing == (None, 2.0, 2.0) and config.patch_size[0] == 1
    assert not (folders["nnssl_preprocessed"] / "Dataset801_Test" / "nnsslPlans_3d_fullres").exists()

    store = CaseStore(folders["nnssl_preprocessed"] / "Dataset801_Test" / "nnsslPlans_2d")
    for index, own in enumerate(SPACINGS):
        box = store.info(index)["body_box"]
        assert store.geometry(index).spacing[0] == own[0]
        assert store.shape(index)[0] == box[0][1] - box[0][0]  # no slice is made or left out
        assert store.geometry(index).spacing[1:] == pytest.approx((2.0, 2.0), rel=0.05)  # a whole number of pixels
    box, norm = store.info(2)["body_box"], config.normalization["CT"]
    cropped = body_volume(index=2)[tuple(slice(*edge) for edge in box)].astype(np.float32)
    normalised = (np.clip(cropped, norm.low, norm.high) - norm.mean) / norm.std
    number = len(cropped) // 2
    alone = resample(normalised[None, number : number + 1], (1, *store.shape(2)[1:]), SPACINGS[2], (9.0, 2.0, 2.0))
    np.testing.assert_allclose(store.read(2)[:, number], alone[:, 0], atol=1e-4)  # every slice is resampled by itself

    assert train.main(["801", "2d", "-tr", "SimSiamIoUTrainer", *SHORT, "hidden=32", "bottleneck=16"]) == 0
    (checkpoint,) = (folders["nnssl_results"] / "Dataset801_Test").glob("SimSiamIoUTrainer__nnsslPlans__2d__*/fold_all/checkpoint_final.pth")
    content = torch.load(checkpoint, weights_only=True)
    assert content["network_weights"]["encoder.stem.convs.0.conv.weight"].ndim == 4
    assert content["nnssl_adaptation_plan"]["pretrain_plan"]["configurations"]["2d"]["spacing"] == [None, 2.0, 2.0]

    dataset = make_dataset(roots, 901, cases=2)
    write_fingerprint(roots, dataset, 1)
    capsys.readouterr()
    assert export.main(["-ckpt", str(checkpoint), "-d", "901"]) == 0
    assert " 2d 0 " in (told := capsys.readouterr().out) and "encoder handed over: 100.0 %" in told
    (plans,) = (roots["nnUNet_preprocessed"] / dataset).glob("nnssl_SimSiamIoU_*.json")
    (weights,) = plans.parent.glob("*.pth")
    pretrained = Pretrained.load(checkpoint)
    check_handed_over(pretrained, plans, weights)

    assert export.main(["-ckpt", str(checkpoint), "-d", "901", "-c", "3d_fullres"]) == 2
    assert "a 2D network was pretrained; nnU-Net's 3d_fullres configuration can't use it" in error_of(capsys)
    assert export.main(["-ckpt", str(checkpoint), "-d", "901", "-patch_size", "1", "32", "32"]) == 2
    assert "a patch of a 2D network has 2 edges, not 3" in error_of(capsys)
    assert train.main(["801", "2d", "-tr", "MAETrainer", "-b", "primus", *SHORT]) == 2
    assert "'primus' has no network for slices" in error_of(capsys)
    assert train.main(["801", "2d", "-tr", "GVSLTrainer", *SHORT]) == 2
    assert "GVSLTrainer needs decoder+pyramid+volume; resenc on slices offers" in error_of(capsys)

    out = tmp_path / "features"
    assert features.main(["-ckpt", str(checkpoint), "-i", str(raw), "-o", str(out), "-device", "cpu"]) == 0
    (found, *_) = sorted(out.rglob("case0*.npz"))
    assert np.load(found)["features"].shape[1] == store.shape(0)[0]  # a map of every slice


def test_slices_are_preprocessed_only_when_they_are_asked_for():
    assert plan_and_preprocess.arguments().parse_args(["-d", "801"]).c == preprocess.arguments().parse_args(["-d", "801"]).c == ["3d_fullres"]


def check_handed_over(pretrained: Pretrained, plans, weights) -> None:
    """Every tensor arrives through nnU-Net's own loader in the network that it builds, which then gives the features of the backbone."""
    target = Target(plans, "2d", "nnUNetTrainer")
    network = target.build(seed=99)
    load_pretrained_weights(network, str(weights))
    loaded = network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in pretrained.weights.items())
    network.load_state_dict(torch.load(weights, weights_only=True)["network_weights"], strict=True)
    backbone = pretrained.backbone(1, target.patch_size).eval()
    load_into_modules(backbone.net, pretrained.weights, pretrained.modules)
    image = torch.randn(2, 1, *target.patch_size)
    with torch.no_grad():
        axis = pretrained.config.slice_axis + 2
        before, after = backbone.pyramid(image.unsqueeze(axis)), network.eval().encoder(image)
    assert all(torch.equal(a.squeeze(axis), b) for a, b in zip(before, after, strict=True))


def test_a_3d_checkpoint_is_not_handed_to_2d(roots, tmp_path, capsys):
    dataset = make_dataset(roots, 901, cases=2)
    write_fingerprint(roots, dataset, 1)
    assert export.main(["-ckpt", str(make_checkpoint(tmp_path / "c.pth", "resenc")), "-d", "901", "-c", "2d"]) == 2
    assert "a 3D network was pretrained; nnU-Net's 2d configuration can't use it" in (text := error_of(capsys)) and "use -c 3d_fullres" in text


@pytest.mark.parametrize("channels", [1, 2])
def test_other_channels_are_fitted_as_in_3d(roots, tmp_path, channels):
    pretrained = Pretrained.load(make_checkpoint(tmp_path / "c.pth", "resenc", configuration="2d"))
    dataset = make_dataset(roots, 901, [f"CT{i}" for i in range(channels)], cases=2)
    write_fingerprint(roots, dataset, channels)
    plans = write_plans(pretrained, dataset, PlanOptions("2d"))
    report = export_nnunet(pretrained, plans, "2d", tmp_path / "out.pth")
    assert report.fraction_of_encoder == 1.0 and bool(report.repeated) == (channels > 1)
    adaptation = torch.load(tmp_path / "out.pth", weights_only=True)["nnssl_adaptation_plan"]
    assert adaptation["recommended_downstream_patchsize"][0] == 1 and len(adaptation["recommended_downstream_patchsize"]) == 3
    if channels == 1:
        check_handed_over(pretrained, plans, tmp_path / "out.pth")


def test_a_stock_trainer_takes_the_file_makes_a_step_and_predicts_volumes(roots, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_extTrainer", str(export_module.TRAINER_FOLDER))
    pretrained = Pretrained.load(make_checkpoint(tmp_path / "c.pth", "resenc", configuration="2d"))
    dataset = make_dataset(roots, 901)
    write_fingerprint(roots, dataset, 1)
    trainer = "nnsslResEncTrainer_short"
    handoff = hand_off(pretrained, dataset, PlanOptions("2d", batch_size=2), trainer)
    preprocess_dataset(901, handoff.plans.stem, ("2d",), (1,), show_progress_bar=False)
    nnunet = get_trainer_from_args("901", "2d", 0, trainer, handoff.plans.stem, False, torch.device("cpu"))
    maybe_load_checkpoint(nnunet, False, False, str(handoff.weights))
    loaded = nnunet.network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in pretrained.weights.items())
    monkeypatch.setattr(nnunet, "plot_network_architecture", lambda: None)
    nnunet.on_train_start()
    nnunet.on_train_epoch_start()
    nnunet.network.train()
    assert math.isfinite(float(nnunet.train_step(next(nnunet.dataloader_train))["loss"]))
    nnunet.set_deep_supervision_enabled(False)
    nnunet.save_checkpoint(f"{nnunet.output_folder}/checkpoint_final.pth")
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, use_mirroring=False)
    predictor.initialize_from_trained_model_folder(nnunet.output_folder_base, (0,))
    logits = predictor.predict_sliding_window_return_logits(torch.randn(1, 3, 36, 36))
    assert logits.shape == (3, 3, 36, 36) and bool(torch.isfinite(logits).all())
