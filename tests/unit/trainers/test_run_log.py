"""What a run leaves to read: files, terminal, and what happens when one of them fails."""

import errno
import io
import json
import os

import pytest
from PIL import Image
from rich.console import Console

from nnssl_ext.core.errors import UserError
from nnssl_ext.trainers import sinks
from nnssl_ext.trainers.pace import Pace
from nnssl_ext.trainers.run_log import RunLog, how_it_ended, milestones
from nnssl_ext.trainers.signals import Stopped
from nnssl_ext.trainers.sinks import read_metrics
from nnssl_ext.trainers.terminal import Bar, Eta, duration

SETTINGS = {
    "trainer": "MAETrainer",
    "family": "resenc",
    "configuration": "3d_fullres",
    "dataset": "Dataset801_Test",
    "plans": "nnsslPlans",
    "name": "MAETrainer__nnsslPlans__3d_fullres",
    "data_hash": "d" * 64,
    "fingerprint_sha256": "f" * 64,
    "patch_size": [32, 32, 32],
    "spacing": [3.0, 3.0, 3.0],
    "cases": {"train": 7, "validation": 1},
    "config": {"epochs": 10, "iterations": 5, "lr": None},
    "overrides": {"epochs": 10},
    "recipe": {"lr": 0.01},
    "batch_size": 2,
    "processes": 1,
    "device": "cpu",
    "total_steps": 50,
    "parameters": 1000,
    "versions": {"torch": "2.4"},
    "command": "nnssl_train 801 3d_fullres -tr MAETrainer -o epochs=10",
}


def record(epoch, **values):
    common = {"epoch": epoch, "step": 5 * (epoch + 1), "lr": 0.01, "train/total": 1.0 / (epoch + 1), "val/total": 2.0 / (epoch + 1)}
    return common | {"seconds": 1.0, "samples_per_second": 10.0, "data_wait_share": 0.1} | values


def quiet_bar(done=0):
    return Bar(50, done, console=Console(file=io.StringIO()))


def log(folder, step=0, bar=None):
    return RunLog(folder, SETTINGS, step, bar=bar or quiet_bar(step))


@pytest.fixture(autouse=True)
def only_own_files(monkeypatch):
    monkeypatch.setenv("nnssl_sinks", "none")


def test_every_epoch_is_appended_to_what_was_there(tmp_path):
    with log(tmp_path) as run:
        run.epoch(record(0))
        inode = (tmp_path / "metrics.jsonl").stat().st_ino
        run.epoch(record(1))
        assert (tmp_path / "metrics.jsonl").stat().st_ino == inode  # not rewritten
        assert [entry["epoch"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]
    assert json.loads((tmp_path / "run.json").read_text()) == SETTINGS
    assert (tmp_path / "progress.png").is_file()


def test_a_continued_run_has_every_epoch_once(tmp_path):
    with log(tmp_path) as run:
        for epoch in range(4):
            run.epoch(record(epoch, note="first"))
    with log(tmp_path, step=12) as run:  # the checkpoint was in the middle of the third epoch
        for epoch in range(2, 5):
            run.epoch(record(epoch, note="second"))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(entry["epoch"], entry["note"]) for entry in records] == [(0, "first"), (1, "first"), (2, "second"), (3, "second"), (4, "second")]


def test_a_last_line_that_a_crash_cut_off_is_left_out_and_replaced(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(record(0)) + "\n" + json.dumps(record(1))[:30])
    assert [entry["epoch"] for entry in read_metrics(file)] == [0]
    with log(tmp_path, step=5) as run:
        run.epoch(record(1))
    assert [entry["epoch"] for entry in read_metrics(file)] == [0, 1]


def test_damage_before_the_last_line_is_told(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epo\n' + json.dumps(record(1)) + "\n")
    with pytest.raises(UserError, match="line 1"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_what_is_not_finite_is_written_as_valid_json(tmp_path):
    with log(tmp_path) as run:
        run.epoch(record(0, **{"train/total": float("nan"), "val/total": float("inf")}))
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text() and "Infinity" not in (tmp_path / "metrics.jsonl").read_text()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["train/total"] is None


def test_a_full_disk_is_told_once_and_the_epochs_are_written_when_there_is_room_again(tmp_path, monkeypatch):
    bar, truth = quiet_bar(), os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with log(tmp_path, bar=bar) as run:
        run.epoch(record(0))
        monkeypatch.setattr(sinks.os, "fsync", full)
        run.epoch(record(1))
        run.epoch(record(2))
        monkeypatch.setattr(sinks.os, "fsync", truth)
        run.epoch(record(3))
    assert bar.console.file.getvalue().count("warning: metrics.jsonl failed") == 1
    assert "No space left on device" in bar.console.file.getvalue()
    assert [entry["epoch"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


class Failing:
    lasting = False
    calls: list[str] = []

    def __init__(self, folder, settings, step):
        pass

    def add(self, record, step):
        self.calls.append("add")
        raise ConnectionError("server down")

    def picture(self, name, path, step):
        self.calls.append("picture")

    def close(self, end, reason):
        self.calls.append("close")


class Broken(Failing):
    def __init__(self, folder, settings, step):
        raise ConnectionError("no route to host")


@pytest.mark.parametrize(("kind", "calls", "reason"), [(Failing, ["add"], "server down"), (Broken, [], "no route")])
def test_a_sink_that_fails_is_told_once_and_left_out(kind, calls, reason, tmp_path, monkeypatch):
    monkeypatch.setitem(sinks.SINKS, "failing", ("json", kind))
    monkeypatch.setenv("nnssl_sinks", "failing")
    Failing.calls.clear()
    bar = quiet_bar()
    with log(tmp_path, bar=bar) as run:
        for epoch in range(3):
            run.epoch(record(epoch))
    assert Failing.calls == calls
    said = bar.console.file.getvalue()
    assert said.count("warning: failing failed") == 1 and reason in said and "training goes on" in said
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.parametrize(("names", "what"), [("tensorbord", "did you mean 'tensorboard'"), ("wandb", "pip install wandb")])
def test_unknown_and_missing_sinks_are_refused_before_training(names, what, tmp_path, monkeypatch):
    monkeypatch.setenv("nnssl_sinks", names)
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=what):
        log(tmp_path)


def test_alarms_reach_terminal_file_and_page(tmp_path):
    bar = quiet_bar()
    with log(tmp_path, bar=bar) as run:
        run.epoch(record(0))
        run.advance(7, 0.5)
        run.alarm("features of all samples are equal")
        assert "epoch 2: features of all samples are equal" in (tmp_path / "index.html").read_text(encoding="utf-8")
        run.epoch(record(1))
    assert "ALARM: features of all samples are equal" in bar.console.file.getvalue()
    assert [entry.get("alarms") for entry in read_metrics(tmp_path / "metrics.jsonl")] == [None, ["features of all samples are equal"]]
    with log(tmp_path, step=10):
        assert "epoch 2: features of all samples are equal" in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("epochs", [1, 2, 19, 20, 21, 39, 1000])
def test_at_most_twenty_pictures_the_first_and_last_epoch_among_them(epochs):
    chosen = milestones(epochs)
    assert len(chosen) == len(set(chosen)) == min(20, epochs)
    assert chosen[0] == 0 and chosen[-1] == epochs - 1


def test_pictures_that_fail_stop_nothing(tmp_path):
    def broken(path):
        raise ValueError("no such view")

    bar = quiet_bar()
    with log(tmp_path, bar=bar) as run:
        run.draw(0, broken)
        run.draw(1, lambda path: (path.parent.mkdir(), Image.new("RGB", (4, 4)).save(path)))
    assert (tmp_path / "pictures" / "epoch_0002.png").is_file()
    assert "warning: pictures failed (ValueError: no such view)" in bar.console.file.getvalue()


def test_other_ranks_write_and_say_nothing(tmp_path, capsys):
    with RunLog(tmp_path, SETTINGS, 0, quiet=True) as run:
        run.advance(1, 0.5)
        run.alarm("x")
        run.epoch(record(0))
        run.draw(0, lambda path: pytest.fail("drawn"))
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "complete", "expected"),
    [
        (None, True, ("finished", "")),
        (None, False, ("stopped", "at step 7, as asked")),
        (Stopped(15), False, ("stopped", "stopped by SIGTERM; continue with --c")),
        (KeyboardInterrupt(), False, ("stopped", "interrupted from the keyboard")),
        (UserError("the disk is full", "/data"), False, ("failed", "the disk is full: /data")),
        (RuntimeError("out of memory"), False, ("failed", "RuntimeError: out of memory")),
    ],
)
def test_the_end_is_told_in_words(error, complete, expected):
    assert how_it_ended(error, complete, 7) == expected


def test_an_error_passes_through_and_closes_everything(tmp_path):
    with pytest.raises(UserError), log(tmp_path) as run:
        run.epoch(record(0))
        raise UserError("20 steps in a row were not finite", "here")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'class="badge failed"' in page and "20 steps in a row were not finite" in page


def test_durations_of_days_are_days():
    assert [duration(s) for s in (0, 61, 3600, 90061, 3 * 86400)] == ["0:00:00", "0:01:01", "1:00:00", "1 day 1:01:01", "3 days 0:00:00"]


def test_the_time_left_of_a_continued_run_counts_its_own_steps():
    now = [100.0]
    eta = Eta(1000, 900, clock=lambda: now[0])
    assert eta.left(900) == "?"
    now[0] += 20
    assert eta.left(910) == "0:03:00"  # 10 steps in 20 s, 90 to go
    assert eta.steps_per_second(910) == 0.5


def test_without_a_terminal_a_line_appears_at_once_and_then_every_minute():
    now = [0.0]
    bar = Bar(100, 10, console=Console(file=io.StringIO()), clock=lambda: now[0])
    with bar:
        for step in range(11, 41):
            now[0] += 10
            bar.advance(step, 0.25)
    lines = bar.console.file.getvalue().splitlines()
    assert lines[0] == "step 11/100  loss 0.2500  0.1 steps/s  ETA 0:14:50"
    assert len(lines) == 5  # after 10, 70, 130, 190 and 250 seconds


def test_on_a_terminal_the_bar_continues_where_the_run_does():
    bar = Bar(100, 40, console=Console(file=io.StringIO(), force_terminal=True, width=100))
    with bar:
        bar.advance(41, 0.5)
        assert bar.progress.tasks[0].completed == 41 and bar.progress.tasks[0].total == 100
    assert "step 41" not in bar.console.file.getvalue()


def test_curves_are_redrawn_only_as_often_as_they_may_cost(tmp_path, monkeypatch):
    drawn, now = [], [0.0]
    picture = sinks.ProgressPicture(tmp_path / "progress.png", [])
    picture.pace = Pace(share=0.02, clock=lambda: now[0])

    def slow(records, path):
        drawn.append(len(records))
        now[0] += 1.0

    monkeypatch.setattr(sinks, "draw_progress", slow)
    for epoch in range(100):
        picture.add(record(epoch), 0)
        now[0] += 1.0
    picture.close("finished", "")
    assert drawn == [1, 51, 100]
