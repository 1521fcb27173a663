"""The loop: resume, validation, files, mistakes."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import FolderLock
from nnssl_ext.nn import distributed
from nnssl_ext.trainers.base import SSLTrainer
from nnssl_ext.trainers.checkpoint import load_checkpoint
from nnssl_ext.trainers.mae import MAETrainer
from tests.make_data import tiny_plan, tiny_store

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("undrawn")
PLAN = tiny_plan()
SHORT = MAETrainer.Config(epochs=3, iterations=4, batch_size=1, workers=0)


def trainer(folder, family="primus", config=SHORT, **options) -> MAETrainer:
    return MAETrainer(PLAN, "3d_fullres", config, options.pop("store", tiny_store()), folder, family=family, **options)


@pytest.mark.parametrize("family", ["resenc", "primus"])
@pytest.mark.parametrize("step", [1, 7, 8, 11])
def test_resuming_at_a_step_equals_the_uninterrupted_run_bit_for_bit(family, step, tmp_path):
    trainer(tmp_path / "whole", family).fit()
    trainer(tmp_path / "parts", family).fit(stop_at=step)
    trainer(tmp_path / "parts", family, dataclasses.replace(SHORT, workers=1)).fit(resume=True)
    whole, parts = (load_checkpoint(tmp_path / name / "checkpoint_final.pth") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts["ssl_state"][key]) for key, value in whole["ssl_state"].items())
    assert all(torch.equal(value, parts["network_weights"][key]) for key, value in whole["network_weights"].items())
    for number, state in whole["optimizer_state"]["state"].items():
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(parts["optimizer_state"]["state"][number][key])) for key, value in state.items())
    curves = [[json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")] for name in ("whole", "parts")]
    keys = ("epoch", "step", "train/total", "val/total", "lr")
    assert [[record[k] for k in keys] for record in curves[0]] == [[record[k] for k in keys] for record in curves[1]]
    assert whole["best"] == parts["best"]


def test_a_run_leaves_checkpoints_curves_pictures_and_its_settings(tmp_path, undrawn):
    undrawn.undo()
    trainer(tmp_path).fit()
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoint_best.pth",
        "checkpoint_final.pth",
        "checkpoint_latest.pth",
        "checkpoint_previous.pth",
        "index.html",
        "metrics.jsonl",
        "progress.png",
        "pictures",
        "run.json",
        "tensorboard",
    }
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3
    settings = json.loads((tmp_path / "run.json").read_text())
    assert settings["recipe"]["lr"] == 3e-4 and settings["cases"] == {"train": 7, "validation": 1}


def test_a_checkpoint_holds_plain_types_and_says_how_to_rebuild_the_encoder(tmp_path):
    run = trainer(tmp_path, "resenc")
    run.fit()
    content = load_checkpoint(tmp_path / "checkpoint_final.pth")
    assert content["trainer_name"] == "MAETrainer" and content["transfer"] == "encoder+decoder" and content["step"] == 12
    assert content["nnssl_adaptation_plan"]["key_to_encoder"] == "encoder.stages"
    assert set(content["network_weights"]) == set(run.backbone.net.state_dict())
    assert all(torch.equal(value, content["ssl_state"][f"backbone.net.{key}"]) for key, value in content["network_weights"].items())


def test_aliased_weights_are_stored_once(tmp_path):
    run = trainer(tmp_path, "resenc")
    run.fit(stop_at=1)
    unique = sum(p.numel() for p in run.model.parameters())
    assert (tmp_path / "checkpoint_latest.pth").stat().st_size < 4 * unique * 2.6  # weights and momentum, not four aliases


def test_validation_repeats_exactly(tmp_path):
    run = trainer(tmp_path)
    run.initialize()
    assert run.val_cases and run.validate() == run.validate()


def test_fewer_than_three_subjects_train_without_validation(tmp_path):
    run = trainer(tmp_path, store=tiny_store(cases=2), config=dataclasses.replace(SHORT, epochs=1))
    run.fit()
    assert "val/total" not in json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (tmp_path / "checkpoint_best.pth").exists()


def test_a_probe_that_fails_is_told_and_ends_nothing(tmp_path, capsys):
    run = trainer(tmp_path)
    run.probe = lambda backbone, device: {"dice": 1 / 0}
    run.fit()
    assert (tmp_path / "checkpoint_final.pth").is_file() and "probe failed (ZeroDivisionError" in capsys.readouterr().out


def test_the_previous_checkpoint_is_of_an_earlier_step(tmp_path):
    trainer(tmp_path).fit()
    steps = [load_checkpoint(tmp_path / f"checkpoint_{name}.pth")["step"] for name in ("previous", "latest")]
    assert steps[0] < steps[1]


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    trainer(tmp_path).fit(stop_at=1)
    before = (tmp_path / "checkpoint_latest.pth").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        trainer(tmp_path).fit()
    assert (tmp_path / "checkpoint_latest.pth").read_bytes() == before


def test_a_folder_in_use_is_refused(tmp_path):
    with FolderLock(tmp_path), pytest.raises(UserError, match="in use by process"):
        trainer(tmp_path).fit()


def test_continuing_with_other_hyper_parameters_is_refused(tmp_path):
    trainer(tmp_path).fit(stop_at=1)
    with pytest.raises(UserError, match="mask_ratio"):
        trainer(tmp_path, config=dataclasses.replace(SHORT, mask_ratio=0.5)).fit(resume=True)
    with pytest.raises(UserError, match="another run"):
        trainer(tmp_path, "resenc").fit(resume=True)


def test_continuing_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="checkpoint not found"):
        trainer(tmp_path).fit(resume=True)


def test_a_finished_run_can_be_continued_without_effect(tmp_path):
    trainer(tmp_path).fit()
    before = (tmp_path / "checkpoint_final.pth").read_bytes()
    trainer(tmp_path).fit(resume=True)
    assert (tmp_path / "checkpoint_final.pth").read_bytes() == before


def test_a_method_whose_needs_the_backbone_lacks_fails_before_data_are_read(tmp_path):
    class NeedsMore(SSLTrainer):
        needs = (frozenset({"graph"}),)

    with pytest.raises(UserError, match="NeedsMore needs graph"):
        NeedsMore(PLAN, "3d_fullres", SHORT, None, tmp_path)


def test_beside_a_gpu_the_loader_leaves_the_intensities_to_it(tmp_path):
    tested = trainer(tmp_path)
    tested.initialize()
    assert not tested._dataset([0], "train").on_device
    tested.device = torch.device("cuda")
    assert tested._dataset([0], "train").on_device


RANK = """
import sys, torch
torch.set_num_threads(1)
from nnssl_ext.nn import distributed
from tests.unit.trainers import test_base
with distributed.group("cpu"):
    getattr(test_base, sys.argv[1])(sys.argv[2])
distributed.leave(0)  # as the command line does: gloo aborts some teardowns of the interpreter
"""


def launch(function, folder, processes=2):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        return distributed.launch([sys.executable, "-c", RANK, function.__name__, str(folder)], processes)


def one_epoch(folder):
    trainer(folder, "resenc", dataclasses.replace(SHORT, epochs=1, lr=1e-3)).fit()


def test_two_processes_with_half_the_batch_train_like_one(tmp_path):
    trainer(tmp_path / "one", "resenc", dataclasses.replace(SHORT, epochs=1, lr=1e-3, batch_size=2)).fit()
    assert launch(one_epoch, tmp_path / "two") == 0
    one, two = (load_checkpoint(tmp_path / name / "checkpoint_final.pth")["ssl_state"] for name in ("one", "two"))
    assert max(float((value - two[key]).abs().max()) for key, value in one.items()) < 1e-5


def broken_rank(folder):
    if distributed.rank() == 1:
        raise SystemExit(2)
    distributed.barrier()  # would wait for ever


def test_a_failure_in_one_of_several_processes_ends_all_with_its_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "GRACE_S", 1.0)
    assert launch(broken_rank, tmp_path) == 2
