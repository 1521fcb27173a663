"""A process that is killed while it saves never leaves an unreadable checkpoint."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.core import files
from nnssl_ext.trainers.checkpoint import load_checkpoint, save_checkpoint

TRIALS = 60
WRITER = """
import sys, torch
from nnssl_ext.trainers.checkpoint import load_checkpoint, save_checkpoint
path, number = sys.argv[1], 0
try:
    number = load_checkpoint(path)["step"]
except Exception:
    pass
weights = torch.randint(10**6, (10**6,))
print("ready", flush=True)
while True:
    number += 1
    save_checkpoint(path, {"network_weights": {"w": weights}, "step": number, "check": weights.sum()})
    print(number, flush=True)
"""


@pytest.mark.crash
def test_a_kill_at_a_random_instant_of_saving_leaves_the_old_or_the_new_checkpoint(tmp_path):
    path, chance, saved = tmp_path / "checkpoint_latest.pth", random.Random(0), 0
    for _ in range(TRIALS):
        writer = subprocess.Popen([sys.executable, "-W", "ignore", "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert writer.stdout.readline() == "ready\n"
        writer.stdout.readline()  # one save is whole
        time.sleep(chance.random() * 0.05)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        content = load_checkpoint(path)
        assert torch.equal(content["network_weights"]["w"].sum(), content["check"])
        assert content["step"] > saved
        saved = content["step"]
    with files.FolderLock(tmp_path):
        assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []  # the next run clears what the killed ones left


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EROFS", "EDQUOT"])
def test_a_failing_disk_keeps_the_former_checkpoint_and_says_so(call, code, tmp_path, monkeypatch):
    import errno

    path = tmp_path / "checkpoint_latest.pth"
    save_checkpoint(path, {"network_weights": {}, "step": 1})

    def fail(*_):
        raise OSError(getattr(errno, code), "injected")

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(UserError, match="could not write: the disk"):
        save_checkpoint(path, {"network_weights": {}, "step": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_latest.pth"]


def test_a_truncated_checkpoint_is_refused_in_three_lines(tmp_path):
    path = tmp_path / "checkpoint_latest.pth"
    save_checkpoint(path, {"network_weights": {"w": torch.randn(1000)}})
    for size in (0, 10, 200, path.stat().st_size - 1):
        path.with_name("cut.pth").write_bytes(path.read_bytes()[:size])
        with pytest.raises(UserError) as error:
            load_checkpoint(path.with_name("cut.pth"))
        assert len(str(error.value).splitlines()) <= 3


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"network_weights": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="can't be read"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"network_weights": {}, "format_version": 99}])
def test_other_files_are_not_taken_for_checkpoints(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "other.pth")
