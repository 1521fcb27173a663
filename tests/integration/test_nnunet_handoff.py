"""The hand-off to stock nnU-Net, end to end: its own loader, its own trainers, its own console programs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

from nnssl_ext.cli import finetune
from nnssl_ext.core.errors import UserError
from nnssl_ext.finetuning import export as export_module
from nnssl_ext.finetuning.commands import hand_off
from nnssl_ext.finetuning.export import Target, export_nnunet, find_trainer, load_into_modules
from nnssl_ext.finetuning.plans import PlanOptions, write_plans
from nnssl_ext.finetuning.pretrained import Pretrained, adapt
from nnssl_ext.nn.tokens import resize_positions
from tests.make_nnunet import make_checkpoint, make_dataset, make_roots, preprocess, write_fingerprint

pytestmark = pytest.mark.nnunet
STEM = {
    "resenc": "encoder.stem.convs.0.conv.weight",
    "primus": "down_projection.proj.weight",
    "primus_v2": "down_projection.stem.blocks.0.skip.0.conv.weight",
    "segformer3d": "encoder.stem.projection.weight",
}


@pytest.fixture
def roots(tmp_path, monkeypatch):
    return make_roots(tmp_path, monkeypatch)


def prepare(roots: dict[str, Path], channels: int = 1, options: PlanOptions | None = None, labels=None, **checkpoint) -> tuple[Pretrained, Path]:
    """A checkpoint and its plan for a dataset without images preprocessed."""
    pretrained = Pretrained.load(make_checkpoint(roots["nnUNet_raw"].parent / "checkpoint.pth", **checkpoint))
    dataset = make_dataset(roots, 901, [f"CT{i}" for i in range(channels)], labels, cases=1)
    write_fingerprint(roots, dataset, channels)
    return pretrained, write_plans(pretrained, dataset, options or PlanOptions())


@pytest.mark.parametrize("patch", [(32, 32, 32), (16, 32, 48)], ids=str)
def test_register_tokens_arrive_too_and_their_positions_are_not_interpolated(roots, tmp_path, patch):
    pretrained, plans = prepare(roots, 1, PlanOptions(patch_size=patch), family="primus", registers=4)
    report = export_nnunet(pretrained, plans, "3d_fullres", tmp_path / "out.pth")
    assert report.fraction_of_encoder == 1.0 and "register_tokens" in report.copied
    content = torch.load(tmp_path / "out.pth", weights_only=True)["network_weights"]
    assert torch.equal(content["register_tokens"], pretrained.weights["register_tokens"])
    assert torch.equal(content["eva.pos_embed"][:, :4], pretrained.weights["eva.pos_embed"][:, :4])


@pytest.mark.parametrize("patch", [(32, 32, 32), (16, 32, 48)], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("family", ["resenc", "primus", "primus_v2", "segformer3d"])
def test_every_tensor_arrives_through_nnunets_own_loader(roots, tmp_path, family, channels, patch):
    pretrained, plans = prepare(roots, channels, PlanOptions(patch_size=patch), family=family)
    report = export_nnunet(pretrained, plans, "3d_fullres", tmp_path / "out.pth")
    assert report.fraction_of_encoder == 1.0
    assert bool(report.repeated) == (channels > 1) and bool(report.resized) == (family.startswith("primus") and patch != (32, 32, 32))
    assert all(not name.startswith(pretrained.modules) for name in report.untouched)

    network = Target(plans, "3d_fullres", "nnUNetTrainer").build(seed=99)
    fresh = {key: value.clone() for key, value in network.state_dict().items()}
    load_pretrained_weights(network, str(tmp_path / "out.pth"))
    loaded = network.state_dict()
    stem = {f"{module}.weight" for module in pretrained.adaptation["keys_to_in_proj"]}
    assert STEM[family] in stem
    for key, value in pretrained.weights.items():
        expected = value
        if key in stem and channels > 1:
            expected = value.repeat(1, channels, 1, 1, 1) / channels
        elif key in report.resized:
            expected = resize_positions(value, (4, 4, 4), tuple(size // 8 for size in patch))
        assert torch.equal(loaded[key], expected), key
    for key, value in loaded.items():  # the aliases through the decoder are the same tensors
        if key.startswith("decoder.encoder."):
            assert torch.equal(value, loaded[key.removeprefix("decoder.")])
    assert any(not torch.equal(loaded[key], fresh[key]) for key in pretrained.weights)

    if channels == 1 and patch == (32, 32, 32):
        backbone, image = pretrained.backbone(1, patch).eval(), torch.randn(1, 1, *patch)
        load_into_modules(backbone.net, pretrained.weights, pretrained.modules)
        with torch.no_grad():
            before = backbone.pyramid(image)
            backbone.net = network.eval()
            after = backbone.pyramid(image)
        assert max(float((a - b).abs().max()) for a, b in zip(before, after)) == 0.0


@pytest.mark.parametrize("family", ["resenc", "segformer3d"])
def test_the_trained_decoder_is_handed_over_but_for_its_segmentation_layers(roots, tmp_path, family):
    pretrained, plans = prepare(roots, family=family, transfer="encoder+decoder")
    report = export_nnunet(pretrained, plans, "3d_fullres", tmp_path / "out.pth")
    assert report.untouched and all(".seg_layers." in name for name in report.untouched)
    weights = torch.load(tmp_path / "out.pth", weights_only=True)["network_weights"]
    assert all(torch.equal(weights[key], value) for key, value in pretrained.weights.items())


def test_several_pretraining_channels_become_several_others(roots, tmp_path):
    pretrained, plans = prepare(roots, 3, family="resenc")
    wide = dataclasses.replace(
        pretrained, weights=adapt(pretrained, 2, (32, 32, 32)).tensors, adaptation={**pretrained.adaptation, "pretrain_num_input_channels": 2}
    )
    export_nnunet(wide, plans, "3d_fullres", tmp_path / "out.pth")
    stem = torch.load(tmp_path / "out.pth", weights_only=True)["network_weights"][STEM["resenc"]]
    assert torch.equal(stem, wide.weights[STEM["resenc"]].sum(1, keepdim=True).repeat(1, 3, 1, 1, 1) / 3)


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_regions_decide_the_number_of_heads(roots, tmp_path, family):
    labels = {"background": 0, "whole": [1, 2], "tumour": [2], "rim": [1]}
    pretrained, plans = prepare(roots, labels=labels, family=family)
    description = json.loads((plans.parent / "dataset.json").read_text())
    (plans.parent / "dataset.json").write_text(json.dumps({**description, "regions_class_order": [1, 2, 3]}))
    export_nnunet(pretrained, plans, "3d_fullres", tmp_path / "out.pth")
    with torch.no_grad():
        output = Target(plans, "3d_fullres", "nnUNetTrainer").build(0)(torch.zeros(1, 1, 32, 32, 32))
    assert (output if torch.is_tensor(output) else output[0]).shape[1] == 3


def only_the_encoders_own_keys(network, tensors, modules):
    """What users do: overwrite `encoder.*` in the dict. nnU-Net's aliases (`decoder.encoder.*`) come later and win."""
    state = {key: value.clone() for key, value in network.state_dict().items()}
    return {**state, **tensors}


def all_but_the_last_block(network, tensors, modules):
    state = network.state_dict()
    fresh = {key: value.clone() for key, value in state.items()}
    load_into_modules(network, tensors, modules)
    last = "encoder.stages.3" if "encoder.stem.convs.0.conv.weight" in state else "eva.blocks.3"
    assert any(last in key for key in state)
    return {key: fresh[key] if last in key else value.clone() for key, value in state.items()}


def without_aliases(network, tensors, modules):
    return {key: value for key, value in load_into_modules(network, tensors, modules).items() if not key.startswith(("decoder.encoder", "mask_token"))}


@pytest.mark.parametrize(
    ("family", "broken"),  # Primus has no aliases: overwriting the dict would do there
    [("resenc", only_the_encoders_own_keys), *((family, broken) for family in ("resenc", "primus") for broken in (all_but_the_last_block, without_aliases))],
)
def test_a_broken_exporter_never_leaves_a_file(roots, tmp_path, monkeypatch, family, broken):
    pretrained, plans = prepare(roots, family=family)
    monkeypatch.setattr(export_module, "load_into_modules", broken)
    with pytest.raises(UserError, match="nnU-Net loaded other values|nnU-Net's loader refuses"):
        export_nnunet(pretrained, plans, "3d_fullres", tmp_path / "out.pth")
    assert not list(tmp_path.glob("*out.pth*"))


def test_a_target_that_takes_less_than_all_is_refused(roots, tmp_path):
    pretrained, plans = prepare(roots, family="resenc")
    content = json.loads(plans.read_text())
    content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["n_blocks_per_stage"][-1] += 1
    plans.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"only \d\d\.\d % of the pretrained encoder.*encoder\.stages\.3\.blocks\.1"):
        export_nnunet(pretrained, plans, "3d_fullres", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_the_same_export_twice_gives_the_same_tensors(roots, tmp_path):
    pretrained, plans = prepare(roots, family="primus")
    state = torch.get_rng_state()
    files = [tmp_path / "a.pth", tmp_path / "b.pth"]
    for file in files:
        export_nnunet(pretrained, plans, "3d_fullres", file)
    one, two = (torch.load(file, weights_only=True)["network_weights"] for file in files)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("source", ["checkpoint", "export"])
@pytest.mark.parametrize(("family", "size"), [("resenc", None), ("primus", None), ("primus", "S")])
def test_the_adaptation_plan_follows_the_contract(roots, tmp_path, family, size, source):
    pretrained, plans = prepare(roots, 2, family=family, size=size)
    file = pretrained.path
    if source == "export":
        file = tmp_path / "out.pth"
        export_nnunet(pretrained, plans, "3d_fullres", file)
    content = torch.load(file, weights_only=True)
    plan, weights = content["nnssl_adaptation_plan"], content["network_weights"]
    assert isinstance(weights, dict) and all(torch.is_tensor(value) and value.device.type == "cpu" for value in weights.values())
    assert isinstance(content["citations"], list) and {"type", "name"} <= content["citations"][0].keys()
    architecture = plan["architecture_plans"]
    assert architecture["arch_class_name"] == {"resenc": "ResidualEncoderUNet", "primus": "PrimusS" if size else "Primus"}[family]
    if size is None:
        assert isinstance(architecture["arch_kwargs"], dict) and isinstance(architecture["arch_kwargs_requiring_import"], list)
        assert all(isinstance(architecture["arch_kwargs"][key], (str, type(None))) for key in architecture["arch_kwargs_requiring_import"])
    else:
        assert architecture["arch_kwargs"] is None
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    assert configuration["spacing"] == [3.0, 3.0, 3.0] and configuration["patch_size"] == plan["recommended_downstream_patchsize"] == [32, 32, 32]
    channels = 2 if source == "export" else 1
    assert plan["pretrain_num_input_channels"] == channels
    assert plan["key_to_encoder"] == {"resenc": "encoder.stages", "primus": "eva"}[family]
    assert plan["key_to_stem"] == {"resenc": "encoder.stem", "primus": "down_projection"}[family]
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        assert any(name.startswith(key + ".") for name in weights)
    assert plan["keys_to_in_proj"] and all(weights[f"{key}.weight"].shape[1] == channels for key in plan["keys_to_in_proj"])
    if family == "primus":
        assert [key for key in weights if plan["key_to_lpe"] in key] == ["eva.pos_embed"]
    else:
        assert plan["key_to_lpe"] is None and len(plan["keys_to_in_proj"]) == 2
    json.dumps({key: value for key, value in content.items() if key != "network_weights"})  # plain types only


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return preprocess(tmp_path_factory.mktemp("nnunet"), patch)


@pytest.mark.parametrize(
    ("family", "size", "trainer"),
    [
        ("resenc", None, "nnUNetTrainer"),
        ("primus", None, "nnUNetTrainer"),
        ("primus_v2", None, "nnUNetTrainer"),
        ("primus", "S", "nnUNet_Primus_S_Trainer"),
        ("resenc", None, "nnsslResEncTrainer_short"),
        ("primus", None, "nnsslPrimusTrainer_short"),
        ("segformer3d", None, "nnUNetTrainer"),
        ("segformer3d", None, "nnsslSegFormerTrainer_short"),
        ("primus_v2", None, "nnsslPrimusTrainer_lld_short"),
    ],
)
def test_a_trainer_takes_the_file_and_makes_a_step(preprocessed, tmp_path, monkeypatch, family, size, trainer):
    for variable, path in preprocessed.items():
        monkeypatch.setenv(variable, str(path))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_extTrainer", str(export_module.TRAINER_FOLDER))
    pretrained = Pretrained.load(make_checkpoint(tmp_path / "c.pth", family, size=size))
    handoff = hand_off(pretrained, "Dataset901_Tiny", PlanOptions(batch_size=2), trainer)
    nnunet = get_trainer_from_args("901", "3d_fullres", 0, trainer, handoff.plans.stem, False, torch.device("cpu"))
    assert type(nnunet) is find_trainer(trainer)
    maybe_load_checkpoint(nnunet, False, False, str(handoff.weights))
    loaded = nnunet.network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in pretrained.weights.items())  # before the first step

    monkeypatch.setattr(nnunet, "plot_network_architecture", lambda: None)
    nnunet.on_train_start()
    nnunet.on_train_epoch_start()
    nnunet.network.train()
    before = {key: value.clone() for key, value in nnunet.network.state_dict().items()}
    result = nnunet.train_step(next(nnunet.dataloader_train))
    assert math.isfinite(float(result["loss"]))
    assert any(not torch.equal(before[key], value) for key, value in nnunet.network.state_dict().items() if key.startswith(pretrained.modules))
    nnunet.network.eval()
    assert math.isfinite(float(nnunet.validation_step(next(nnunet.dataloader_val))["loss"]))
    nnunet.set_deep_supervision_enabled(False)
    with torch.no_grad():
        assert nnunet.network(torch.zeros(1, 1, 32, 32, 32)).shape == (1, 3, 32, 32, 32)

    nnunet.save_checkpoint(f"{nnunet.output_folder}/checkpoint_final.pth")
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)  # stock prediction: sliding window, mirroring
    predictor.initialize_from_trained_model_folder(nnunet.output_folder_base, (0,))
    assert all(torch.equal(value, nnunet.network.state_dict()[key]) for key, value in predictor.network.state_dict().items())
    logits = predictor.predict_sliding_window_return_logits(torch.randn(1, 36, 40, 36))
    assert logits.shape == (3, 36, 40, 36) and bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("trainer", ["nnsslResEncTrainer_short", "nnsslPrimusTrainer_short", "nnsslSegFormerTrainer_lld_short"])
def test_a_training_with_warm_up_continues_from_its_checkpoint(preprocessed, tmp_path, monkeypatch, trainer):
    for variable, path in preprocessed.items():
        monkeypatch.setenv(variable, str(path))
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_extTrainer", str(export_module.TRAINER_FOLDER))
    monkeypatch.setenv("nnssl_finetune_epochs", "3")
    family = next(family for name, family in (("ResEnc", "resenc"), ("Primus", "primus"), ("SegFormer", "segformer3d")) if name in trainer)
    pretrained = Pretrained.load(make_checkpoint(tmp_path / "c.pth", family))
    handoff = hand_off(pretrained, "Dataset901_Tiny", PlanOptions(), trainer)
    first, second = (get_trainer_from_args("901", "3d_fullres", 0, trainer, handoff.plans.stem, False, torch.device("cpu")) for _ in range(2))
    first.initialize()
    first.current_epoch = 1
    first.logger.log("ema_fg_dice", 0.5, 0)
    first._best_ema = np.float64(0.5)  # what nnU-Net logs: torch.load(weights_only=True) refuses it
    first.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    second.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert second.training_stage == "train" and second.current_epoch == 2
    second.on_train_epoch_start()
    assert 0 < second.optimizer.param_groups[0]["lr"] < second.initial_lr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "trainer", "options"),
    [
        ("resenc", "nnsslResEncTrainer_short", []),
        ("primus", "nnsslPrimusTrainer_short", []),
        ("segformer3d", "nnsslSegFormerTrainer_short", []),
        ("resenc", "nnsslResEncTrainer_short", ["-mode", "linear", "-n", "2"]),
        ("primus", "nnsslPrimusTrainer_short", ["-mode", "linear", "-ratio", "0.5"]),
        ("primus", "nnsslPrimusTrainer_lld_short", ["-mode", "adapter", "-n", "2"]),
    ],
)
def test_the_real_console_programs_fine_tune_predict_and_evaluate(roots, tmp_path, monkeypatch, capfd, family, trainer, options):
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setenv("nnssl_finetune_epochs", "1")
    monkeypatch.setenv("nnssl_finetune_iterations", "2")
    dataset = make_dataset(roots, 901, listed=False)
    given = ["-ckpt", str(make_checkpoint(tmp_path / "c.pth", family)), "-d", "901", "-tr", trainer, "-device", "cpu", "-np", "1", *options]
    assert finetune.main(given) == 0, capfd.readouterr().err[-3000:]
    (trained,) = (roots["nnUNet_results"] / dataset).iterdir()
    assert trained.name.startswith(f"{trainer}__nnssl_MAE_") and (trained / "fold_0/checkpoint_final.pth").is_file()
    (log,) = (trained / "fold_0").glob("training_log*.txt")
    assert ("wants 2 of 4 labelled cases" in log.read_text(encoding="utf-8")) == bool(options)
    predicted = sitk.GetArrayFromImage(sitk.ReadImage(str(trained / "imagesTs_fold_0/case5.nii.gz")))
    assert predicted.shape == (36, 36, 36) and set(np.unique(predicted)) <= {0, 1, 2}
    assert "foreground_mean" in json.loads((trained / "imagesTs_fold_0/summary.json").read_text())
    capfd.readouterr()
    assert finetune.main([*given, "--c"]) == 0, capfd.readouterr().err[-3000:]  # a finished training: only validation, prediction, evaluation
    assert "nnUNetv2_preprocess" not in capfd.readouterr().out
