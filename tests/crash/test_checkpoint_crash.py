"""A process that is killed while it saves never leaves an unreadable checkpoint."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from nnssl_ext.core import files
from nnssl_ext.core.errors import UserError
from nnssl_ext.trainers.checkpoint import load_checkpoint, save_checkpoint

KILLS = [8, pytest.param(100, marks=pytest.mark.slow)]


def write_forever(path, ready) -> None:
    torch.set_num_threads(1)
    number = load_checkpoint(path)["step"]
    weights = torch.randint(10**6, (10**6,))
    while True:
        number += 1
        save_checkpoint(path, {"network_weights": {"w": weights}, "step": number, "check": weights.sum()})
        ready.set()


@pytest.mark.crash
@pytest.mark.parametrize("kills", KILLS)
def test_a_kill_at_a_random_instant_of_saving_leaves_the_old_or_the_new_checkpoint(kills, tmp_path):
    path, chance, saved, fork = tmp_path / "checkpoint_latest.pth", random.Random(0), 0, multiprocessing.get_context("fork")
    save_checkpoint(path, {"network_weights": {"w": torch.zeros(1)}, "step": 0, "check": torch.zeros(1).sum()})
    torch.set_num_threads(1)
    for _ in range(kills):
        ready = fork.Event()
        writer = fork.Process(target=write_forever, args=(path, ready))
        writer.start()
        assert ready.wait(60)  # one save is whole
        time.sleep(chance.random() * 0.05)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        content = load_checkpoint(path)
        assert torch.equal(content["network_weights"]["w"].sum(), content["check"])
        assert content["step"] > saved
        saved = content["step"]
    assert list(tmp_path.glob(".*.tmp"))  # some were hit while writing
    with files.FolderLock(tmp_path):
        assert not list(tmp_path.glob(".*.tmp"))  # the next run clears what the killed ones left


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
