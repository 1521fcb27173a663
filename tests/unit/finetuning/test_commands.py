"""The commands that are printed and run, and the console scripts' errors."""

import os
import shlex
import sys

import pytest

from nnssl_ext.cli import export, finetune
from nnssl_ext.core.errors import UserError
from nnssl_ext.finetuning import commands
from nnssl_ext.finetuning.commands import Machine
from tests.make_nnunet import make_checkpoint, make_dataset, make_roots, write_fingerprint

pytestmark = pytest.mark.nnunet


@pytest.fixture
def roots(tmp_path, monkeypatch):
    return make_roots(tmp_path, monkeypatch)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Stands for nnU-Net's programs: notes its arguments, and fails when called as the one named in $FAIL."""
    log = tmp_path / "log"
    script = tmp_path / "program"
    script.write_text(f'#!/bin/sh\necho "$0 $*" >> {log}\n[ "$(basename $0)" != "$FAIL" ]\n')
    script.chmod(0o755)

    def beside(name):
        link = tmp_path / name
        if not link.exists():
            link.symlink_to(script)
        return str(link)

    monkeypatch.setattr(commands, "_program", beside)
    return lambda: [os.path.basename(line.split()[0]) for line in log.read_text().splitlines()]


def arguments(roots, tmp_path, family="resenc"):
    write_fingerprint(roots, make_dataset(roots, 901, cases=2), 1)
    return ["-ckpt", str(make_checkpoint(tmp_path / "c.pth", family)), "-d", "901"]


def test_export_prints_the_report_and_the_next_commands(roots, tmp_path, capsys):
    assert export.main([*arguments(roots, tmp_path), "-np", "1", "-out", str(tmp_path / "my weights")]) == 0
    out = capsys.readouterr().out
    preprocess, train = (shlex.split(line) for line in out.split("next:\n")[1].splitlines())
    assert preprocess[:3] == ["nnUNetv2_preprocess", "-d", "901"] and preprocess[-4:] == ["-c", "3d_fullres", "-np", "1"]
    assert train[:4] == ["nnUNetv2_train", "Dataset901_Tiny", "3d_fullres", "0"] and train[train.index("-tr") + 1] == "nnUNetTrainer"
    assert os.path.isfile(train[-1]) and "encoder handed over: 100.0 %" in out and len(out.split("next:")[0].splitlines()) < 12


def test_finetune_runs_all_programs_in_order(roots, tmp_path, program):
    assert finetune.main([*arguments(roots, tmp_path, "primus"), "-device", "cpu"]) == 0
    assert program() == ["nnUNetv2_preprocess", "nnUNetv2_train", "nnUNetv2_predict", "nnUNetv2_evaluate_folder"]


def test_plan_only_runs_nothing_and_prints_how_our_trainers_are_found(roots, tmp_path, program, capsys):
    assert finetune.main([*arguments(roots, tmp_path), "--plan_only", "-f", "all"]) == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "log").exists()
    assert "export nnUNet_extTrainer=" in out and "nnUNetv2_train Dataset901_Tiny 3d_fullres all -tr nnsslResEncTrainer " in out


def test_a_failing_program_ends_the_run_with_its_name(roots, tmp_path, program, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "nnUNetv2_train")
    assert finetune.main([*arguments(roots, tmp_path), "-device", "cpu"]) == 2
    assert program() == ["nnUNetv2_preprocess", "nnUNetv2_train"]
    assert "nnUNetv2_train ended with exit code 1" in capsys.readouterr().err


def test_continuing_does_not_load_the_pretrained_weights_again(roots, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(commands, "run", lambda command, machine: ran.append(command))
    assert finetune.main([*arguments(roots, tmp_path), "-device", "cpu", "--c"]) == 0
    assert ran[1][-1] == "--c" and "-pretrained_weights" not in ran[1]


def test_a_killed_program_is_named_by_its_signal(monkeypatch):
    monkeypatch.setattr(commands, "_program", lambda name: sys.executable)
    with pytest.raises(UserError, match="stopped by SIGKILL"):
        commands.run(("nnUNetv2_train", "-c", "import os; os.kill(os.getpid(), 9)"), Machine("cpu"))


@pytest.mark.parametrize("variable", commands.FOLDERS)
def test_a_missing_folder_variable_is_named(roots, monkeypatch, variable, capsys):
    monkeypatch.delenv(variable)
    assert export.main(["-ckpt", "none.pth", "-d", "901"]) == 2
    assert f"the environment variable {variable} is not set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["-d", "902"], "unknown dataset ID 902"),
        (["-d", "Dataset901_Tiyn"], "did you mean 'Dataset901_Tiny'?"),
        (["-tr", "nnUNetTrainr"], "finds no trainer"),
        (["-c", "2d"], "3D network"),
        (["-patch_size", "33", "32", "32"], "divisible"),
        (["-ckpt", "none.pth"], "checkpoint not found"),
        (["-tr", "nnUNet_Primus_S_Trainer"], "would take only 0.0 %"),
        (["-n", "2"], "nnUNetTrainer trains on all labelled cases"),
    ],
)
def test_mistakes_end_with_three_lines_and_exit_code_2(roots, tmp_path, extra, message, capsys):
    assert export.main([*arguments(roots, tmp_path), *extra]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) <= 3
    assert not list(roots["nnUNet_preprocessed"].rglob("*.pth"))


def test_a_dataset_json_of_another_format_is_refused(roots, tmp_path, capsys):
    given = arguments(roots, tmp_path)
    (roots["nnUNet_raw"] / "Dataset901_Tiny" / "dataset.json").write_text("{}")
    assert export.main(given) == 2 and "it lacks labels" in capsys.readouterr().err


def test_more_labelled_cases_than_the_fold_has_are_refused_before_anything_is_written(roots, tmp_path, capsys):
    write_fingerprint(roots, make_dataset(roots, 901, cases=10), 1)
    given = ["-ckpt", str(make_checkpoint(tmp_path / "c.pth", "resenc")), "-d", "901"]
    assert finetune.main([*given, "-n", "9", "--plan_only"]) == 2
    assert "9 labelled cases are wanted; the fold trains on 8" in capsys.readouterr().err
    assert not list(roots["nnUNet_preprocessed"].rglob("nnssl_*"))
    assert finetune.main([*given, "-n", "9", "-f", "all", "--plan_only"]) == 0
    assert finetune.main([*given, "-ratio", "0.5", "-mode", "frozen", "--plan_only"]) == 0
    out = capsys.readouterr().out
    assert "4 of 8 of fold 0" in out and "not trained" in out and "_frozen_0.5cases_" in out


@pytest.mark.parametrize("extra", [["-n", "2", "-ratio", "0.5"], ["-n", "0"], ["-ratio", "0"], ["-ratio", "1.5"], ["-ratio", "many"], ["-mode", "half"]])
def test_a_mistaken_number_of_labelled_cases_or_mode_is_told(extra, capsys):
    with pytest.raises(SystemExit, match="2"):
        finetune.main(["-ckpt", "c.pth", "-d", "901", *extra])
    assert len(capsys.readouterr().err.strip().splitlines()) <= 3


def test_a_trainer_with_a_network_of_its_own_cannot_freeze(roots, tmp_path, capsys):
    write_fingerprint(roots, make_dataset(roots, 901, cases=2), 1)
    given = ["-ckpt", str(make_checkpoint(tmp_path / "c.pth", "primus", size="S")), "-d", "901", "-tr", "nnUNet_Primus_S_Trainer"]
    assert export.main([*given, "-mode", "frozen"]) == 2 and "does not freeze" in capsys.readouterr().err
    assert export.main([*given, "-mode", "encoder"]) == 0
