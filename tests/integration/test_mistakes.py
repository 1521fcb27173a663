"""Common mistakes: exit code 2 and at most three lines that say what is wrong, where, and how to mend it."""

import json

import pytest

from nnssl_ext.cli import convert, export, extract_fingerprint, finetune, plan_and_preprocess, plan_experiment, preprocess, train, verify
from nnssl_ext.core import files
from tests.make_raw import nnunet_dataset

MAINS = {
    "convert": convert.main,
    "export": export.main,
    "fingerprint": extract_fingerprint.main,
    "finetune": finetune.main,
    "plan": plan_experiment.main,
    "plan_and_preprocess": plan_and_preprocess.main,
    "preprocess": preprocess.main,
    "train": train.main,
    "verify": verify.main,
}

MISTAKES = [  # command line; what the message must contain, part of it naming the remedy
    ("train", "the following arguments are required", "nnssl_train --help"),
    ("train 801", "configuration", "nnssl_train --help"),
    ("train 801 3d_fullres --vall", "unrecognized arguments: --vall", "did you mean '--val'?"),
    ("train 801 3d_fullres -num_gpuz 2", "unrecognized arguments: -num_gpuz", "did you mean '-num_gpus'?"),
    ("train 801 3d_fullres -num_gpus two", "invalid int value: 'two'", "--help"),
    ("train 801 3d_fullres -device tpu", "'tpu'", "cuda"),
    ("train 999 3d_fullres", "unknown dataset ID 999", "known IDs: 801"),
    ("train Dataset801_Tset 3d_fullres", "unknown dataset", "did you mean 'Dataset801_Test'?"),
    ("train 801 3d_fulres", "3d_fulres", "did you mean '3d_fullres'?"),
    ("train 801 3d_fullres", "no preprocessed", "nnssl_preprocess -d 801"),
    ("train 801 3d_fullres -tr MAETrainr", "MAETrainr", "did you mean 'MAETrainer'?"),
    ("train 801 3d_fullres -b unet", "unet", "resenc"),
    ("train 801 3d_fullres -p nope", "no plans 'nope'", "nnssl_plan_and_preprocess -d 801"),
    ("train 801 3d_fullres -o epoch=2", "unknown hyper-parameter 'epoch'", "did you mean 'epochs'?"),
    ("train 801 3d_fullres -o epochs", "not of the form key=value", "-o lr=1e-4"),
    ("train 801 3d_fullres -o epochs=many", "'many' is not a valid int", "-o epochs=many"),
    ("plan -d 999", "unknown dataset ID 999", "known IDs: 801"),
    ("plan -d 801 -pl Planer", "Planer", "did you mean 'Planner'?"),
    ("plan -d 802", "fingerprint", "nnssl_extract_fingerprint -d Dataset802_Raw"),
    ("plan -d 801 -gpu_memory_target lots", "invalid float value: 'lots'", "--help"),
    ("plan", "the following arguments are required: -d", "--help"),
    ("preprocess -d 802", "no plans", "nnssl_plan_experiment -d 802"),
    ("preprocess -d 801 -c 3d_fulres", "3d_fulres", "did you mean '3d_fullres'?"),
    ("preprocess -d 801 -np 0", "must be at least 1", "--help"),
    ("preprocess -d 801 -part 4 -total_parts 4", "no part 4 of 4", "counted from 0"),
    ("preprocess -d 801 -storage int8", "'int8'", "uint16"),
    ("fingerprint -d 999", "unknown dataset ID 999", "known IDs"),
    ("fingerprint -d 803", "Dataset803_Empty", "fix:"),
    ("plan_and_preprocess -d 999", "unknown dataset ID 999", "known IDs"),
    ("verify -d 999", "unknown dataset ID 999", "known IDs"),
    ("verify -d 801 --header_only --store", "not allowed with", "--help"),
    ("convert nowhere -d 805 -name New", "nowhere", "fix:"),
    ("convert {raw}/Dataset801_Test -d 801 -name Other", "ID 801 belongs to Dataset801_Test", "choose another ID"),
    ("convert {raw}/Dataset801_Test -d 806 -name a/b", "makes no dataset name", "letters, digits"),
    ("convert {raw}/Dataset801_Test -d 806 -name New -layout nope", "nope", "fix:"),
    ("export -ckpt nowhere.pth -d 901", "nowhere.pth", "fix:"),
    ("export -d 901", "required: -ckpt", "nnssl_export --help"),
    ("export -ckpt {text} -d 901", "can't be read", "use another checkpoint"),
    ("export -ckpt {text} -d 999", "999", "fix:"),
    ("finetune -ckpt {text} -d 901 -f 7", "'7'", "nnssl_finetune --help"),
    ("finetune -ckpt nowhere.pth -d 901", "nowhere.pth", "fix:"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Dataset 801 planned and not preprocessed, 802 raw only, 803 empty; 901 for nnU-Net."""
    root = tmp_path_factory.mktemp("mistakes")
    variables = {name: root / name for name in ("nnssl_raw", "nnssl_preprocessed", "nnssl_results", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for folder in variables.values():
        folder.mkdir()
    nnunet_dataset(variables["nnssl_raw"])
    nnunet_dataset(variables["nnssl_raw"], name="Dataset802_Raw")
    (variables["nnssl_raw"] / "Dataset803_Empty").mkdir()
    nnunet_dataset(variables["nnUNet_raw"], name="Dataset901_Target")
    (root / "text.pth").write_text("no checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in variables.items():
            patch.setenv(name, str(folder))
        assert extract_fingerprint.main(["-d", "801", "-np", "1"]) == plan_experiment.main(["-d", "801", "-gpu_memory_target", "0.5"]) == 0
    return variables | {"text": root / "text.pth"}


@pytest.fixture
def here(data, monkeypatch, tmp_path):
    for name, folder in data.items():
        if name != "text":
            monkeypatch.setenv(name, str(folder))
    monkeypatch.chdir(tmp_path)
    return data


def told(capsys, line):
    """The message of a command line that is a mistake."""
    program, *arguments = line.split()
    capsys.readouterr()
    try:
        code = MAINS[program](arguments)
    except SystemExit as error:
        code = error.code
    message = capsys.readouterr().err
    assert code == 2, message
    assert message.startswith("error: ") and len(message.strip().splitlines()) <= 3 and "Traceback" not in message, message
    return message


@pytest.mark.parametrize(("line", "what", "fix"), MISTAKES, ids=[line for line, *_ in MISTAKES])
def test_a_mistake_says_what_is_wrong_and_how_to_mend_it(line, what, fix, here, capsys):
    message = told(capsys, line.format(raw=here["nnssl_raw"], text=here["text"]))
    assert what in message and fix in message, message


@pytest.mark.parametrize(("variable", "line"), [("nnssl_raw", "fingerprint -d 801"), ("nnssl_preprocessed", "preprocess -d 801")])
def test_a_folder_that_is_not_set_is_named_with_the_line_that_sets_it(variable, line, here, capsys, monkeypatch):
    monkeypatch.delenv(variable)
    assert f"export {variable}=" in told(capsys, line)


def test_plans_that_are_no_json_are_named(here, capsys):
    file = here["nnssl_preprocessed"] / "Dataset801_Test" / "brokenPlans.json"
    file.write_text('{"configurations": ')
    assert "not valid JSON" in told(capsys, "train 801 3d_fullres -p brokenPlans")
    file.write_text(json.dumps({"configurations": {}}))
    assert "brokenPlans.json" in told(capsys, "preprocess -d 801 -p brokenPlans")


def test_a_dataset_in_use_names_the_process(here, capsys):
    with files.FolderLock(here["nnssl_preprocessed"] / "Dataset801_Test"):
        assert "in use by process" in told(capsys, "fingerprint -d 801")
