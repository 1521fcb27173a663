"""A training whose loader, data or disk fails says so in a few lines and goes on exactly afterwards."""

import dataclasses
import errno
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl_ext.core import files
from nnssl_ext.core.errors import DiskError, UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.data.loader import StepDataset, batches, deaths_explained
from nnssl_ext.data.views import Crop
from nnssl_ext.preprocessing.store import CaseStore, pack_body, write_case
from nnssl_ext.trainers.checkpoint import load_checkpoint, load_latest, save_checkpoint
from nnssl_ext.trainers.mae import MAETrainer
from tests.make_data import TINY_SHAPE, tiny_plan, tiny_store

pytestmark = pytest.mark.usefixtures("undrawn")
PLAN = tiny_plan()
SHORT = MAETrainer.Config(epochs=3, iterations=2, val_iterations=1, batch_size=1, workers=0, precision="fp32")
SHAPE = TINY_SHAPE


def written(folder, cases=4):
    """A store on the disk."""
    for number, array in enumerate(tiny_store(cases).arrays):
        info = {"subject": f"s{number}", "stored": Geometry(SHAPE, (3.0, 3.0, 3.0)).as_dict(), "fill": [-1.0], "settings_sha256": "x", "source": []}
        info["body"] = pack_body(np.ones(SHAPE, bool), SHAPE)
        write_case(folder, f"case{number}", array, info, (16, 16, 16))
    return CaseStore(folder)


def trainer(folder, store=None, cls=MAETrainer, **options):
    return cls(PLAN, "3d_fullres", dataclasses.replace(SHORT, **options), store or tiny_store(), folder, family="primus")


def lines(error):
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def equal_runs(one, two):
    first, second = (load_checkpoint(folder / "checkpoint_final.pth")["ssl_state"] for folder in (one, two))
    return all(torch.equal(value, second[key]) for key, value in first.items())


class Deadly(MAETrainer):
    """In step 3 its loader process receives a signal."""

    number = signal.SIGKILL

    def step(self, model, batch):
        if self.next_step == 3 and model.training:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            loaders = [int(pid) for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
            for pid in loaders:
                os.kill(pid, self.number)
            time.sleep(bool(loaders))  # torch tells of it here
        return super().step(model, batch)


@pytest.mark.crash
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks the loader process up in /proc")
@pytest.mark.parametrize(("number", "words"), [(signal.SIGKILL, "ask for more memory"), (signal.SIGBUS, "/dev/shm"), (signal.SIGSEGV, "-o workers=0")])
def test_a_loader_process_that_dies_is_told_and_the_run_goes_on_exactly(number, words, tmp_path, monkeypatch):
    monkeypatch.setattr(Deadly, "number", number)
    with pytest.raises(UserError, match=rf"a loader process died \(killed by signal {number.value}, {number.name}\)") as error:
        trainer(tmp_path / "parts", cls=Deadly, workers=1).fit()
    assert words in lines(error)
    assert load_latest(tmp_path / "parts")["step"] == 2  # the last epoch's
    assert "a loader process died" in (tmp_path / "parts" / "index.html").read_text(encoding="utf-8")
    trainer(tmp_path / "parts", cls=Deadly).fit(resume=True)
    trainer(tmp_path / "whole").fit()
    assert equal_runs(tmp_path / "parts", tmp_path / "whole")


def train_on(folder, done) -> None:
    torch.set_num_threads(1)
    run = trainer(folder, epochs=10_000)
    run.after_update = lambda step: setattr(done, "value", step + 1)
    run.fit(resume=(folder / "checkpoint_latest.pth").exists())


@pytest.mark.crash
@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_a_kill_at_a_random_instant_of_the_loop_costs_at_most_an_epoch_and_the_run_goes_on_exactly(kills, tmp_path):
    chance, fork, interval, torn = random.Random(0), multiprocessing.get_context("fork"), SHORT.iterations, 0
    trainer(tmp_path / "first").fit(stop_at=1)  # what a training imports late is imported here, not in every process
    for _ in range(kills):
        begin = load_latest(tmp_path / "parts")["step"] if (tmp_path / "parts" / "checkpoint_latest.pth").exists() else 0
        done = fork.Value("i", begin, lock=False)  # a killed process would keep the lock for ever
        process = fork.Process(target=train_on, args=(tmp_path / "parts", done))
        process.start()
        while done.value < begin + interval + 1:  # an epoch is saved
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(chance.random() * 0.2)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        torn += bool(list((tmp_path / "parts").glob(".*.tmp")))
        assert load_checkpoint(tmp_path / "parts" / "checkpoint_latest.pth")["step"] >= done.value - interval
        load_checkpoint(tmp_path / "parts" / "checkpoint_previous.pth") if begin else None
        for line in (tmp_path / "parts" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[:-1]:
            json.loads(line)
    assert torn or kills < 50  # some were hit while writing
    end = load_latest(tmp_path / "parts")["step"] + 1
    for folder in ("parts", "whole"):
        trainer(tmp_path / folder, epochs=10_000).fit(resume=folder == "parts", stop_at=end)
    first, second = (load_latest(tmp_path / folder)["ssl_state"] for folder in ("parts", "whole"))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


class Leaving(StepDataset):
    def __getitem__(self, step):
        os._exit(3)


def test_a_loader_process_that_ends_by_itself_is_told():
    with pytest.raises(UserError, match="a loader process died") as error, deaths_explained():
        next(batches(Leaving(tiny_store(), Crop((16, 16, 16)), range(4), 0, 1), 0, 4, workers=1))
    assert "-o workers=0 shows why" in lines(error)


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match="CUDA out of memory"), deaths_explained():
        raise RuntimeError("CUDA out of memory")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_case_ends_the_run_with_its_name_and_the_run_goes_on_exactly(workers, damage, tmp_path):
    store = written(tmp_path / "store")
    trainer(tmp_path / "whole", store).fit()
    case = (tmp_path / "store") / "case2.b2nd"
    content = case.read_bytes()
    broken = bytearray(content)
    broken[len(content) // 2] ^= 16
    if damage == "missing":
        case.unlink()
    else:
        case.write_bytes(broken if damage == "flipped" else content[:-100])
    with pytest.raises(UserError, match="damaged|missing") as error:
        trainer(tmp_path / "parts", CaseStore(tmp_path / "store") if damage != "missing" else store, workers=workers).fit()
    assert "case2.b2nd" in lines(error) and "nnssl_preprocess" in lines(error) and "nnssl_verify" in lines(error)
    case.write_bytes(content)
    begun = (tmp_path / "parts" / "checkpoint_latest.pth").exists()
    trainer(tmp_path / "parts", CaseStore(tmp_path / "store")).fit(resume=begun)
    assert equal_runs(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fails_while_a_case_is_read_is_told(workers, tmp_path, monkeypatch):
    store = written(tmp_path)

    def fail(self, case):
        raise OSError(errno.EIO, "Input/output error", str(self.folder / "case1.b2nd"))

    monkeypatch.setattr(CaseStore, "verify", fail)
    with pytest.raises(UserError, match="can't be read: Input/output error") as error:
        next(batches(StepDataset(store, Crop((16, 16, 16)), range(4), 0, 2), 0, 4, workers))
    assert "case1.b2nd" in lines(error)


def test_a_case_is_compared_with_its_hash_once_by_all_loader_processes(tmp_path, monkeypatch):
    store, seen = written(tmp_path / "store"), tmp_path / "seen"
    verify = CaseStore.verify

    def note(self, case):
        with open(seen, "a") as file:
            file.write(f"{case}\n")
        verify(self, case)

    monkeypatch.setattr(CaseStore, "verify", note)
    data = StepDataset(store, Crop((16, 16, 16)), range(4), 0, 4)
    assert len(list(batches(data, 0, 1, workers=1)) + list(batches(data, 1, 9, workers=2))) == 9
    assert sorted(seen.read_text().split()) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("target", ["checkpoint", "case"])
def test_a_flipped_byte_is_found_before_training_wherever_it_is(target, tmp_path):
    chance, found = random.Random(1), 0
    if target == "checkpoint":
        trainer(tmp_path / "run").fit(stop_at=5)
        file = tmp_path / "run" / "checkpoint_latest.pth"
    else:
        data = StepDataset(written(tmp_path / "store", 1), Crop((16, 16, 16)), [0], 0, 1)
        file = tmp_path / "store" / "case0.b2nd"
    content = bytearray(file.read_bytes())
    for offset in sorted(chance.sample(range(len(content)), 500)):
        former = content[offset]
        content[offset] ^= chance.randrange(1, 256)
        file.write_bytes(content)
        content[offset] = former
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(file) if target == "checkpoint" else data[0]
        found += 1
        if target == "checkpoint" and found % 50 == 0:
            assert load_latest(tmp_path / "run")["step"] == 4  # the previous one
    assert found == 500
    file.write_bytes(content)
    assert load_latest(tmp_path / "run")["step"] == 5 if target == "checkpoint" else data[0]


FAULTS = ("write", "fsync", "replace")


def inject(monkeypatch, call, code, path):
    """Writing a file named like `path` fails from now on."""

    class Failing(io.FileIO):
        def write(self, data):
            raise OSError(getattr(errno, code), "injected")

    def fail(*_, **__):
        raise OSError(getattr(errno, code), "injected")

    if call == "write":
        opened = open
        monkeypatch.setattr(
            "builtins.open", lambda file, mode="r", *a, **k: Failing(file, mode) if path.name in str(file) and "w" in mode else opened(file, mode, *a, **k)
        )
        monkeypatch.setattr(Path, "write_bytes", fail)
        monkeypatch.setattr(Path, "write_text", fail)
    else:
        monkeypatch.setattr(files.os, call, fail)


@pytest.mark.parametrize("call", FAULTS)
@pytest.mark.parametrize(("code", "words"), [("ENOSPC", "the disk is full"), ("EIO", "the disk failed"), ("EROFS", "the disk is read-only")])
def test_a_failing_disk_keeps_the_former_checkpoint_and_case(call, code, words, tmp_path, monkeypatch):
    path = tmp_path / "run" / "checkpoint_latest.pth"
    path.parent.mkdir()
    store = written(tmp_path / "store", 1)
    save_checkpoint(path, {"network_weights": {"w": torch.ones(5000)}, "step": 1})
    with monkeypatch.context() as patch:
        inject(patch, call, code, path)
        with pytest.raises(DiskError, match=f"could not write: {words}") as error:
            save_checkpoint(path, {"network_weights": {"w": torch.zeros(5000)}, "step": 2}, path.with_name("checkpoint_previous.pth"))
        assert str(path.parent) in lines(error) and "run the same command again" in lines(error)
        with pytest.raises(DiskError, match=f"could not write: {words}"):
            write_case(tmp_path / "store", "case0", np.zeros((1, *SHAPE), np.float32), {}, (16, 16, 16))
    assert load_latest(path.parent)["step"] == 1
    store.verify(0)
    assert not list(tmp_path.rglob(".*.tmp"))


def overfill(path) -> None:
    """Save more than the kernel lets this process write."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save_checkpoint(path, {"network_weights": {"w": torch.ones(10**6)}, "step": 2})
    except DiskError:
        os._exit(7)


def test_a_kernel_that_refuses_in_the_middle_of_writing_keeps_the_former_checkpoint(tmp_path):
    path = tmp_path / "checkpoint_latest.pth"
    save_checkpoint(path, {"network_weights": {"w": torch.ones(10)}, "step": 1})
    writer = multiprocessing.get_context("fork").Process(target=overfill, args=(path,))
    writer.start()
    writer.join()
    assert writer.exitcode == 7 and load_checkpoint(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_latest.pth"]


def test_a_disk_that_refuses_metrics_and_pictures_ends_no_run(tmp_path, monkeypatch, undrawn):
    undrawn.undo()
    replace = os.replace

    def fail(source, target):
        if Path(target).suffix in (".png", ".html", ".jsonl"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", fail)
    trainer(tmp_path).fit()
    assert load_checkpoint(tmp_path / "checkpoint_final.pth")["step"] == 6 and not (tmp_path / "index.html").exists()


def test_a_capture_that_the_disk_refuses_ends_no_run(tmp_path, monkeypatch, capsys):
    replace = os.replace

    def fail(source, target):
        if "nonfinite" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    class Broken(MAETrainer):
        def step(self, model, batch):
            losses = super().step(model, batch)
            return {"total": losses["total"] * float("nan")} if self.next_step == 3 and model.training else losses

    monkeypatch.setattr(files.os, "replace", fail)
    run = trainer(tmp_path, cls=Broken)
    run.fit()
    assert run.guard.total == 1 and "the state before it is lost: could not write: the disk is full" in capsys.readouterr().out
