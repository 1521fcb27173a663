"""nnssl_train as a user runs it, from raw volumes."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from nnssl_ext.cli import export, finetune, plan_and_preprocess, train
from nnssl_ext.core import files
from nnssl_ext.core.files import sha256_file
from nnssl_ext.trainers.checkpoint import load_checkpoint
from nnssl_ext.trainers.mae import MAETrainer
from tests.make_nnunet import make_dataset, make_roots, write_fingerprint
from tests.make_raw import nnunet_dataset

SHORT = ["-device", "cpu", "-o", "epochs=2", "iterations=2", "batch_size=1", "workers=0"]
RUN = "MAETrainer__nnsslPlans__3d_fullres__epochs=2_iterations=2_batch_size=1"


@pytest.fixture
def dataset(folders):
    nnunet_dataset(folders["nnssl_raw"])
    assert plan_and_preprocess.main(["-d", "801", "-gpu_memory_target", "0.5", "-np", "1"]) == 0
    return folders["nnssl_results"] / "Dataset801_Test" / RUN / "fold_all"


def error_of(capsys) -> str:
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ") and len(text.splitlines()) <= 3
    return text


def test_training_ends_with_a_checkpoint_and_says_where(dataset, capsys):
    assert train.main(["801", "3d_fullres", *SHORT]) == 0
    assert str(dataset / "checkpoint_final.pth") in capsys.readouterr().out
    assert load_checkpoint(dataset / "checkpoint_final.pth")["step"] == 4
    assert train.main(["801", "3d_fullres", *SHORT, "--val"]) == 0
    best = min(json.loads(line)["val/total"] for line in (dataset / "metrics.jsonl").read_text().splitlines())
    assert f"total {best:.6f}" in capsys.readouterr().out


def test_a_run_is_continued_with_c_and_never_overwritten(dataset, capsys):
    assert train.main(["801", "3d_fullres", *SHORT]) == 0
    assert train.main(["801", "3d_fullres", *SHORT]) == 2
    assert "continue it with --c" in error_of(capsys)
    assert train.main(["801", "3d_fullres", *SHORT, "--c"]) == 0


def test_the_other_family_and_other_values_get_their_own_folder(dataset):
    assert train.main(["801", "3d_fullres", "-b", "primus", *SHORT, "mask_ratio=0.6"]) == 0
    assert (dataset.parents[1] / "MAETrainer__nnsslPlans__3d_fullres__b=primus_epochs=2_iterations=2_batch_size=1_mask_ratio=0.6").is_dir()


def test_a_run_that_starts_from_another_has_its_own_folder_and_continues_without_it(dataset, capsys):
    assert train.main(["801", "3d_fullres", *SHORT]) == 0
    first = dataset / "checkpoint_final.pth"
    assert train.main(["801", "3d_fullres", *SHORT, "-init", str(first)]) == 0
    digits = sha256_file(first)[:8]
    folder = dataset.parents[1] / f"{RUN}_init={digits}" / "fold_all"
    assert "MAETrainer, step 4, with its heads" in (out := capsys.readouterr().out) and str(folder) in out
    assert load_checkpoint(folder / "checkpoint_final.pth")["init"]["file"] == f"Dataset801_Test/{RUN}/fold_all/checkpoint_final.pth"
    for file in dataset.iterdir():
        file.unlink() if file.is_file() else None
    (folder / "checkpoint_final.pth").unlink()
    assert train.main(["801", "3d_fullres", *SHORT, "--c", "-init", digits]) == 0
    assert "starting from" not in capsys.readouterr().out
    assert train.main(["801", "3d_fullres", *SHORT, "--c", "-init", str(first)]) == 2
    assert "digits behind init=" in error_of(capsys)


def test_a_shared_model_starts_a_run_as_its_checkpoint_does_and_fine_tunes(dataset, tmp_path, monkeypatch, capsys):
    assert train.main(["801", "3d_fullres", *SHORT]) == 0
    first, model = dataset / "checkpoint_final.pth", tmp_path / "model"
    assert export.main(["-ckpt", str(first), "--hub", str(model), "--heads"]) == 0
    trained = []
    for given in (first, model):
        assert train.main(["801", "3d_fullres", *SHORT, "-init", str(given)]) == 0
        (file,) = dataset.parents[1].glob(f"{RUN}_init=*/fold_all/checkpoint_final.pth")
        trained.append(load_checkpoint(file)["network_weights"])
        shutil.rmtree(file.parents[1])
    assert all(torch.equal(trained[0][name], value) for name, value in trained[1].items())
    assert not torch.equal(*[weights[next(iter(weights))] for weights in (load_checkpoint(first)["network_weights"], trained[0])])
    roots = make_roots(tmp_path, monkeypatch)
    labelled = make_dataset(roots, 901, ["CT"], cases=1)
    write_fingerprint(roots, labelled, 1)
    assert finetune.main(["-ckpt", str(model), "-d", "901", "--plan_only", "-device", "cpu"]) == 0
    assert "100.0 %" in capsys.readouterr().out


def test_two_processes_train_together(dataset):
    assert train.main(["801", "3d_fullres", "-num_gpus", "2", *SHORT]) == 0
    content = load_checkpoint(dataset / "checkpoint_final.pth")
    assert json.loads((dataset / "run.json").read_text())["processes"] == 2
    assert not [key for key in content["ssl_state"] if key.startswith("module.")]


def test_mistakes_end_with_exit_code_2_and_say_how_to_mend_them(dataset, capsys, monkeypatch):
    for arguments, message in (
        (["999", "3d_fullres"], "unknown dataset ID 999"),
        (["801", "3d_fulres"], "did you mean '3d_fullres'"),
        (["801", "median"], "nnssl_preprocess -d 801 -c median"),
        (["801", "3d_fullres", "-tr", "MAEtrainer"], "did you mean 'MAETrainer'"),
        (["801", "3d_fullres", "-b", "resencL"], "did you mean 'resenc'"),
        (["801", "3d_fullres", "-p", "otherPlans"], "nnssl_plan_and_preprocess -d 801"),
        (["801", "3d_fullres", "-o", "epoch=2"], "did you mean 'epochs'"),
        (["801", "3d_fullres", "-o", "lr=high"], "not a valid float"),
        (["801", "3d_fullres", "--c"], "checkpoint not found"),
    ):
        assert train.main([*arguments, "-device", "cpu"]) == 2
        assert message in error_of(capsys)
    if not torch.cuda.is_available():
        assert train.main(["801", "3d_fullres", "-device", "cuda"]) == 2
        assert "no CUDA card" in error_of(capsys)
    monkeypatch.delenv("nnssl_results")
    assert train.main(["801", "3d_fullres", "-device", "cpu"]) == 2
    assert "nnssl_results is not set" in error_of(capsys)


def test_a_patch_that_the_network_cannot_take_is_refused(dataset, folders, capsys):
    file = folders["nnssl_preprocessed"] / "Dataset801_Test" / "nnsslPlans.json"
    plan = json.loads(file.read_text())
    plan["configurations"]["3d_fullres"]["patch_size"] = [20, 25, 24]
    file.write_text(json.dumps(plan))
    for family, what in (("resenc", "total stride"), ("primus", "token size")):
        assert train.main(["801", "3d_fullres", "-b", family, *SHORT]) == 2
        assert f"patch size 20x25x24 is not divisible by the {what}" in error_of(capsys)


def test_a_plan_that_was_damaged_by_hand_is_refused(dataset, folders, capsys):
    file = folders["nnssl_preprocessed"] / "Dataset801_Test" / "nnsslPlans.json"
    plan = json.loads(file.read_text())
    plan["configurations"]["3d_fullres"]["patch_size"] = [20, 25]
    file.write_text(json.dumps(plan))
    assert train.main(["801", "3d_fullres", *SHORT]) == 2
    assert "configurations/3d_fullres/patch_size" in error_of(capsys)


def test_a_folder_in_use_is_refused_with_pid_and_host(dataset, capsys):
    with files.FolderLock(dataset):
        assert train.main(["801", "3d_fullres", *SHORT]) == 2
    assert f"in use by process {os.getpid()} on" in error_of(capsys)


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(dataset, capsys, monkeypatch):
    replace, epochs = os.replace, []

    def fill_up(source, target):
        if os.path.basename(target) == "checkpoint_latest.pth":
            epochs.append(target)
            if len(epochs) > 1:  # the second epoch's
                raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", fill_up)
        assert train.main(["801", "3d_fullres", *SHORT]) == 2
    assert "the disk is full" in error_of(capsys)
    assert load_checkpoint(dataset / "checkpoint_latest.pth")["step"] == 2
    assert not list(dataset.glob(".*.tmp"))
    assert train.main(["801", "3d_fullres", *SHORT, "--c"]) == 0
    assert load_checkpoint(dataset / "checkpoint_final.pth")["step"] == 4


def test_a_captured_step_is_repeated_with_replay(dataset, capsys, monkeypatch):
    step = MAETrainer.step

    def spoil(self, model, batch):
        losses = step(self, model, batch)
        return {"total": losses["total"] * float("nan")} if self.next_step == 1 and model.training else losses

    with monkeypatch.context() as patched:
        patched.setattr(MAETrainer, "step", spoil)
        assert train.main(["801", "3d_fullres", *SHORT]) == 0
        assert train.main(["801", "3d_fullres", *SHORT, "--replay"]) == 0
        assert "step 1: it begins in the loss 'total'" in capsys.readouterr().out
    assert train.main(["801", "3d_fullres", *SHORT, "--replay", "1"]) == 1
    assert "step 1: the step is finite here" in capsys.readouterr().out
    assert train.main(["801", "3d_fullres", *SHORT, "--replay", "2"]) == 2
    assert "captured: 1" in error_of(capsys)


def test_the_console_script_answers_without_importing_torch():
    code = "import sys; from nnssl_ext.cli.train import main\ntry: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
