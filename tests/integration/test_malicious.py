"""Checkpoints that want to run code: all are refused with exit code 2, and nothing of them is executed."""

import ast
import collections
import functools
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnssl_ext.cli import export, finetune, plan_and_preprocess, train
from nnssl_ext.core.errors import UserError
from nnssl_ext.trainers.checkpoint import load_checkpoint, save_checkpoint
from tests.make_nnunet import make_dataset, make_roots
from tests.make_raw import nnunet_dataset

PACKAGE = Path(__file__).parents[2] / "nnssl_ext"
SHORT = ["-device", "cpu", "-o", "epochs=1", "iterations=1", "batch_size=1", "workers=0"]


class Call:
    """Unpickled, it is `function(*arguments)`, and whatever `state` does."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def source(s):
    return f"open({str(s)!r}, 'w').close()"


def beside(s, content):
    """A file beside `s`: a script, or a pickle."""
    file = s.with_name("beside")
    if isinstance(content, str):
        file.write_text(content, encoding="utf-8")
    else:
        torch.save(content, file)
    return str(file)


PAYLOADS = {  # each makes the file `s` where it is unpickled without care
    "os.system": lambda s: Call(os.system, f"touch '{s}'"),
    "eval": lambda s: Call(eval, source(s)),
    "exec": lambda s: Call(exec, source(s)),
    "open": lambda s: Call(open, str(s), "w"),
    "subprocess": lambda s: Call(subprocess.check_call, [sys.executable, "-S", "-c", source(s)]),
    "a method of a path": lambda s: Call(Path.touch, Path(s)),
    "a copied file": lambda s: Call(shutil.copyfile, __file__, str(s)),
    "a script": lambda s: Call(runpy.run_path, beside(s, source(s))),
    "functools": lambda s: Call(functools.reduce, exec, [source(s), {}]),
    "a map": lambda s: Call(list, Call(map, open, [str(s)], ["w"])),
    "a pickle in a pickle": lambda s: Call(pickle.loads, pickle.dumps(Call(open, str(s), "w"))),
    "PyTorch's loader": lambda s: Call(functools.partial(torch.load, weights_only=False), beside(s, Call(open, str(s), "w"))),
    "a type of tensor": lambda s: Call(torch._tensor._rebuild_from_type_v2, open, torch.Tensor, (str(s), "w"), {}),
    "the state of an ordered dictionary": lambda s: Call(collections.OrderedDict, state=Call(open, str(s), "w")),
    "a key": lambda s: {Call(os.system, f"touch '{s}'"): 1},
}


def content(payload):
    """A checkpoint that is complete but for what it brings along."""
    return {"network_weights": {"a": torch.zeros(2)}, "trainer_name": "MAETrainer", "step": 1, "plan": {}, "optimizer_state": payload}


def save(form, path, payload):
    if form == "with a valid hash":
        save_checkpoint(path, content(payload))
    elif form == "of PyTorch":
        torch.save({"format_version": 1, **content(payload)}, path)
    elif form == "of old PyTorch":
        torch.save({"format_version": 1, **content(payload)}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps({"format_version": 1, **content(payload)}, protocol=int(form[-1])))


FORMS = ("with a valid hash", "of PyTorch", "of old PyTorch", "a bare pickle of protocol 0", "a bare pickle of protocol 4")


@pytest.fixture
def sentinel(tmp_path):
    return tmp_path / "executed"


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_payloads_are_real(name, sentinel, tmp_path):
    torch.save(content(PAYLOADS[name](sentinel)), tmp_path / "evil.pth")
    try:
        torch.load(tmp_path / "evil.pth", weights_only=False)
    except Exception as error:  # some fail after their work is done
        print(error)
    assert sentinel.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_malicious_checkpoint_is_refused_and_not_executed(name, form, sentinel, tmp_path):
    save(form, tmp_path / "evil.pth", PAYLOADS[name](sentinel))
    with pytest.raises(UserError, match="can't be read"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not sentinel.exists()


def test_export_and_finetune_refuse_malicious_checkpoints(sentinel, tmp_path, monkeypatch, capsys):
    roots = make_roots(tmp_path / "roots", monkeypatch)
    make_dataset(roots, cases=1)
    for name, payload in PAYLOADS.items():
        save("with a valid hash", tmp_path / "evil.pth", payload(sentinel))
        for main in (export.main, finetune.main):
            assert main(["-ckpt", str(tmp_path / "evil.pth"), "-d", "901"]) == 2, name
            assert "can't be read" in capsys.readouterr().err
    assert not sentinel.exists()


def test_a_training_is_not_continued_from_malicious_checkpoints(folders, sentinel, tmp_path, capsys):
    nnunet_dataset(folders["nnssl_raw"])
    assert plan_and_preprocess.main(["-d", "801", "-gpu_memory_target", "0.5", "-np", "1"]) == 0
    assert train.main(["801", "3d_fullres", *SHORT]) == 0
    folder = next(folders["nnssl_results"].rglob("checkpoint_latest.pth")).parent
    for name, payload in list(PAYLOADS.items())[::3]:
        for file in ("checkpoint_latest.pth", "checkpoint_previous.pth", "checkpoint_best.pth"):
            save("with a valid hash", folder / file, payload(sentinel))
        capsys.readouterr()
        assert train.main(["801", "3d_fullres", *SHORT, "--c"]) == 2, name
        assert train.main(["801", "3d_fullres", *SHORT, "--val"]) == 2, name
        assert capsys.readouterr().err.count("can't be read") == 2
    assert not sentinel.exists()


UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def test_nothing_in_the_package_unpickles_without_care():
    """torch.load only with weights_only=True, np.load never with pickles, and no other module that unpickles."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called, keywords = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                unsafe = called.endswith("torch.load") and keywords.get("weights_only") != "True"
                unsafe |= called.split(".")[0] in UNSAFE and called.split(".")[-1] in ("load", "loads", "Unpickler", "open")
                unsafe |= keywords.get("allow_pickle", "False") != "False" or keywords.get("weights_only", "True") != "True"
                found += [f"{file.name}:{node.lineno}: {called}"] if unsafe else []
            elif isinstance(node, ast.ImportFrom) and node.module in UNSAFE | {"torch"}:
                found += [f"{file.name}:{node.lineno}: {alias.name}" for alias in node.names if alias.name in ("load", "loads", "Unpickler")]
    assert found == []
