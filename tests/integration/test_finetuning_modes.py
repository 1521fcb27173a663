"""What each way of fine-tuning trains, with nnU-Net's own trainers, loader and predictor."""

from __future__ import annotations

import math

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

from nnssl_ext.finetuning import export as export_module
from nnssl_ext.finetuning.commands import hand_off
from nnssl_ext.finetuning.plans import PlanOptions, write_plans
from nnssl_ext.finetuning.pretrained import Pretrained, inside
from tests.make_nnunet import make_checkpoint, make_dataset, make_roots, preprocess, write_fingerprint

pytestmark = pytest.mark.nnunet
CPU = torch.device("cpu")
RESENC, PRIMUS = "nnsslResEncTrainer_short", "nnsslPrimusTrainer_short"
CLASSES = 3


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return preprocess(tmp_path_factory.mktemp("nnunet"), patch)


@pytest.fixture
def ready(preprocessed, tmp_path, monkeypatch):
    for variable, path in preprocessed.items():
        monkeypatch.setenv(variable, str(path))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_extTrainer", str(export_module.TRAINER_FOLDER))
    return preprocessed


def checkpoint(tmp_path, family):
    return Pretrained.load(make_checkpoint(tmp_path / "c.pth", family, transfer="encoder+decoder", registers=2 if family == "primus" else 0))


def handed(tmp_path, family, options, trainer):
    """(the checkpoint, what was written, a trainer with its weights)"""
    pretrained = checkpoint(tmp_path, family)
    handoff = hand_off(pretrained, "Dataset901_Tiny", options, trainer)
    nnunet = get_trainer_from_args("901", "3d_fullres", 0, trainer, handoff.plans.stem, False, CPU)
    maybe_load_checkpoint(nnunet, False, False, str(handoff.weights))
    nnunet.plot_network_architecture = lambda: None
    return pretrained, handoff, nnunet


def steps(nnunet, count):
    nnunet.on_train_start()
    nnunet.on_train_epoch_start()
    for _ in range(count):
        assert math.isfinite(float(nnunet.train_step(next(nnunet.dataloader_train))["loss"]))


def state(network):
    """The state dict and the buffers that it leaves out."""
    return {key: value.clone() for key, value in (*network.state_dict().items(), *network.named_buffers())}


def test_encoder_hands_over_no_decoder(ready, tmp_path):
    pretrained, handoff, nnunet = handed(tmp_path, "resenc", PlanOptions(batch_size=2, mode="encoder"), RESENC)
    full = hand_off(pretrained, "Dataset901_Tiny", PlanOptions(batch_size=2), RESENC)
    assert full.plans != handoff.plans and full.weights != handoff.weights
    loaded, decoder = state(nnunet.network), [key for key in pretrained.weights if key.startswith("decoder.")]
    assert decoder and all(torch.equal(loaded[key], value) for key, value in pretrained.encoder().weights.items())
    assert not any(torch.equal(loaded[key], pretrained.weights[key]) for key in decoder if key.endswith("conv.weight"))
    assert set(decoder) & set(full.report.copied) and not set(decoder) & set(handoff.report.copied) and handoff.report.frozen == ()
    steps(nnunet, 2)
    assert all(not torch.equal(loaded[name], value) for name, value in nnunet.network.named_parameters() if name.startswith("encoder."))


@pytest.mark.parametrize(
    ("family", "mode", "trainer"),
    [
        ("resenc", "frozen", RESENC),
        ("resenc", "linear", "nnUNetTrainer"),
        ("primus", "frozen", "nnUNetTrainer"),
        ("primus", "linear", PRIMUS),
        ("primus_v2", "linear", PRIMUS),
        ("segformer3d", "frozen", "nnUNetTrainer"),
        ("segformer3d", "linear", "nnUNetTrainer"),
        ("primus", "adapter", "nnUNetTrainer"),
        ("primus_v2", "adapter", PRIMUS),
        ("primus", "mlp", PRIMUS),
        ("resenc", "mlp", "nnUNetTrainer"),
    ],
)
def test_a_frozen_encoder_stays_bitwise_what_was_pretrained(ready, tmp_path, family, mode, trainer):
    pretrained, handoff, nnunet = handed(tmp_path, family, PlanOptions(batch_size=2, mode=mode), trainer)
    encoder, before = pretrained.encoder(), state(nnunet.network)
    frozen = {name for name, _ in nnunet.network.named_parameters() if inside(name, encoder.modules)}
    assert frozen == set(handoff.report.frozen) and all(torch.equal(before[key], value) for key, value in encoder.weights.items())

    steps(nnunet, 3)
    parts = [module for name, module in nnunet.network.named_modules() if inside(name, encoder.modules)]
    assert parts and not any(part.training for part in parts) and nnunet.network.training  # nothing is dropped in them
    after, trained = state(nnunet.network), dict(nnunet.network.named_parameters())
    assert all(torch.equal(after[key], value) for key, value in encoder.weights.items())
    assert all(torch.equal(after[key], before[key]) for key, _ in nnunet.network.named_buffers())
    changed = {name for name in trained if not torch.equal(before[name], after[name])}
    assert changed and not changed & frozen and {id(tensor) for tensor in nnunet.optimizer.state} <= {id(trained[name]) for name in trained.keys() - frozen}
    if mode != "frozen":
        assert changed == trained.keys() - frozen  # all of it learns
    if mode == "linear":
        widths = pretrained.backbone(1, pretrained.patch_size).widths
        assert sum(trained[name].numel() for name in changed) == CLASSES * (sum(widths) + 1)

    nnunet.save_checkpoint(f"{nnunet.output_folder}/checkpoint_final.pth")
    predictor = nnUNetPredictor(device=CPU, use_mirroring=False, allow_tqdm=False)  # stock prediction from plans and checkpoint
    predictor.initialize_from_trained_model_folder(nnunet.output_folder_base, (0,))
    assert all(torch.equal(value, after[key]) for key, value in predictor.network.state_dict().items())
    logits = predictor.predict_sliding_window_return_logits(torch.randn(1, 36, 40, 36))
    assert logits.shape == (CLASSES, 36, 40, 36) and bool(torch.isfinite(logits).all())

    again = get_trainer_from_args("901", "3d_fullres", 0, trainer, handoff.plans.stem, False, CPU)
    again.plot_network_architecture = lambda: None
    again.load_checkpoint(f"{nnunet.output_folder}/checkpoint_final.pth")
    steps(again, 1)
    later = state(again.network)
    assert all(torch.equal(later[key], value) for key, value in encoder.weights.items()) and any(not torch.equal(later[name], after[name]) for name in changed)


def test_a_run_trains_on_a_nested_subset_and_validates_on_the_whole_fold(ready, tmp_path):
    _, _, nnunet = handed(tmp_path, "resenc", PlanOptions(batch_size=2), RESENC)
    training, validation = nnunet.do_split()
    splits = ready["nnUNet_preprocessed"] / "Dataset901_Tiny" / "splits_final.json"
    written, former = splits.read_bytes(), set()
    for wanted in (1, 0.5, 3, 4):
        _, handoff, nnunet = handed(tmp_path, "resenc", PlanOptions(batch_size=2, cases=wanted), RESENC)
        chosen, kept = nnunet.do_split()
        assert former < set(chosen) <= set(training) and kept == validation and f"_{wanted}cases_" in handoff.plans.stem
        former = set(chosen)
    assert former == set(training) and splits.read_bytes() == written
    nnunet.on_train_start()
    assert set(nnunet.dataloader_train.data_loader._data.identifiers) == former


@pytest.mark.parametrize("mode", ["frozen", "mlp", "linear"])
def test_a_network_of_slices_is_frozen_too(tmp_path, monkeypatch, mode):
    roots = make_roots(tmp_path, monkeypatch)
    pretrained = Pretrained.load(make_checkpoint(tmp_path / "c.pth", "resenc", configuration="2d"))
    dataset = make_dataset(roots, 902, cases=1)
    write_fingerprint(roots, dataset, 1)
    plans = write_plans(pretrained, dataset, PlanOptions("2d", patch_size=(32, 48), mode=mode))
    report = export_module.export_nnunet(pretrained, plans, "2d", tmp_path / "out.pth")
    network = export_module.Target(plans, "2d", "nnUNetTrainer").build(0)
    assert {name for name, tensor in network.named_parameters() if not tensor.requires_grad} == set(report.frozen)
    assert all(name.startswith("encoder.") for name in report.frozen) and not any(name.startswith("encoder.") for name in report.untouched)
    assert [output.shape for output in network(torch.randn(1, 1, 32, 48))][0] == (1, CLASSES, 32, 48)
