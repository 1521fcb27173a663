"""Common mistakes: exit code 2 and at most three lines that say what is wrong, where, and how to mend it.

The messages are in mistakes.txt. After a change that is meant: UPDATE_SNAPSHOTS=1 pytest tests/integration/test_mistakes.py, and read the difference.
"""

import importlib
import json
import os
import re
import shlex
from pathlib import Path

import pytest

from nnssl_ext.cli import extract_fingerprint, plan_and_preprocess, plan_experiment, train
from nnssl_ext.core import files
from tests.make_raw import nnunet_dataset

SNAPSHOTS = Path(__file__).with_name("mistakes.txt")
MISTAKES = [block.strip().split("\n", 1) for block in SNAPSHOTS.read_text(encoding="utf-8").split("$ ")[1:]]
SCRIPTS = dict(re.findall(r'(?m)^(nnssl_\w+) = "([\w.]+):main"$', (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")))
FOLDERS = ("nnssl_raw", "nnssl_preprocessed", "nnssl_results", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
TINY = ["-device", "cpu", "-o", "epochs=1", "iterations=1", "batch_size=1", "workers=0"]
PLUGIN = """
from nnssl_ext.trainers.base import SSLTrainer

class NeedsMore(SSLTrainer):
    needs = (frozenset({"graph"}),)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Dataset 801 planned and not preprocessed, 802 raw only, 803 empty, 804 trained with three seeds; 901 for nnU-Net."""
    root = tmp_path_factory.mktemp("mistakes")
    variables = {name: root / name for name in FOLDERS}
    for folder in (*variables.values(), root / "plugins", root / "files"):
        folder.mkdir()
    for name in ("Dataset801_Test", "Dataset802_Raw", "Dataset804_Trained"):
        nnunet_dataset(variables["nnssl_raw"], name=name)
    (variables["nnssl_raw"] / "Dataset803_Empty").mkdir()
    nnunet_dataset(variables["nnUNet_raw"], name="Dataset901_Target")
    (root / "files" / "text.pth").write_text("no checkpoint")
    (root / "plugins" / "needs_more.py").write_text(PLUGIN)
    variables |= {"nnssl_extPath": root / "plugins", "files": root / "files"}
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in variables.items():
            patch.setenv(name, str(folder))
        assert extract_fingerprint.main(["-d", "801", "-np", "1"]) == plan_experiment.main(["-d", "801", "-gpu_memory_target", "0.5"]) == 0
        assert plan_and_preprocess.main(["-d", "804", "-gpu_memory_target", "0.5", "-np", "1"]) == 0
        for seed in ("", "seed=1", "seed=2", "seed=3"):
            assert train.main(["804", "3d_fullres", *TINY, *filter(None, [seed])]) == 0
    runs = {seed: next(variables["nnssl_results"].glob(f"Dataset804_Trained/*seed={seed}/fold_all")) for seed in "123"}
    for file in runs["1"].glob("checkpoint_*.pth"):  # nothing to continue
        file.unlink()
    (runs["2"] / "checkpoint_latest.pth").write_bytes((runs["3"] / "checkpoint_latest.pth").read_bytes())  # of another run
    for file in runs["3"].glob("checkpoint_*.pth"):
        file.write_bytes(file.read_bytes()[:-1000])
    return variables


@pytest.fixture
def here(data, monkeypatch, tmp_path):
    for name, folder in data.items():
        monkeypatch.setenv(name, str(folder))
    monkeypatch.chdir(tmp_path)
    return data


def told(capsys, line):
    """The message of a command line that is a mistake."""
    program, *arguments = shlex.split(os.path.expandvars(line))
    capsys.readouterr()
    try:
        code = importlib.import_module(SCRIPTS[program]).main(arguments)
    except SystemExit as error:
        code = error.code
    message = capsys.readouterr().err
    assert code == 2, message
    assert message.startswith("error: ") and len(message.strip().splitlines()) <= 3 and "Traceback" not in message, message
    return message


def general(message, variables):
    """The message as it is on every machine and for every release of Python."""
    for name, folder in variables.items():
        message = message.replace(str(folder), f"${name}")
    return re.sub(r"(?<=choose from )[^)]*", lambda choices: choices[0].replace("'", ""), message).strip()


if os.environ.get("UPDATE_SNAPSHOTS"):

    def test_the_messages_are_written(here, capsys):
        text = "".join(f"$ {line}\n{general(told(capsys, line), here)}\n\n" for line, *_ in MISTAKES)
        SNAPSHOTS.write_text(text.rstrip() + "\n", encoding="utf-8")

else:

    @pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line for line, _ in MISTAKES])
    def test_a_mistake_says_what_is_wrong_and_how_to_mend_it(line, message, here, capsys):
        assert general(told(capsys, line), here) == message


def test_at_least_thirty_mistakes_are_recorded_each_with_a_remedy_and_some_of_every_command():
    assert len({line for line, _ in MISTAKES}) == len(MISTAKES) >= 30
    assert {line.split()[0] for line, _ in MISTAKES} == set(SCRIPTS)
    assert [line for line, message in MISTAKES if "\n  fix: " not in message] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_option_can_be_shortened(script, capsys):
    for option in ("--verbos", "--versio", "--hel"):
        assert "unrecognized arguments" in told(capsys, f"{script} {option}") or "required" in told(capsys, f"{script} {option}")


@pytest.mark.parametrize(("variable", "line"), [("nnssl_raw", "nnssl_extract_fingerprint -d 801"), ("nnssl_preprocessed", "nnssl_preprocess -d 801")])
def test_a_folder_that_is_not_set_is_named_with_the_line_that_sets_it(variable, line, here, capsys, monkeypatch):
    monkeypatch.delenv(variable)
    assert f"export {variable}=" in told(capsys, line)


def test_plans_that_are_no_json_are_named(here, capsys):
    file = here["nnssl_preprocessed"] / "Dataset801_Test" / "brokenPlans.json"
    file.write_text('{"configurations": ')
    assert "not valid JSON" in told(capsys, "nnssl_train 801 3d_fullres -p brokenPlans")
    file.write_text(json.dumps({"configurations": {}}))
    assert "brokenPlans.json" in told(capsys, "nnssl_preprocess -d 801 -p brokenPlans")


def test_a_dataset_in_use_names_the_process(here, capsys):
    with files.FolderLock(here["nnssl_preprocessed"] / "Dataset801_Test"):
        assert "in use by process" in told(capsys, "nnssl_extract_fingerprint -d 801")
