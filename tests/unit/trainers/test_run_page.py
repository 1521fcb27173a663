"""The page of a run shows its state, and the commands on it are the right ones."""

import dataclasses
import re
import shlex

import numpy as np
from PIL import Image

from nnssl_ext.cli import train
from nnssl_ext.trainers.config import parse_overrides
from nnssl_ext.trainers.description import changed, command, describe
from nnssl_ext.trainers.health_charts import grouped
from nnssl_ext.trainers.mae import MAETrainer
from nnssl_ext.trainers.run_page import RunPage, charts
from tests.make_data import ArrayStore, make_plan
from tests.unit.trainers.test_run_log import SETTINGS, record


def page_of(folder):
    return (folder / "index.html").read_text(encoding="utf-8")


def test_a_running_page_reloads_itself_and_a_finished_one_does_not(tmp_path):
    page = RunPage(tmp_path, SETTINGS, [], 0)
    assert 'http-equiv="refresh"' in page_of(tmp_path) and "The first curves appear" in page_of(tmp_path)
    page.close("finished", "")
    assert "refresh" not in page_of(tmp_path) and 'class="badge finished"' in page_of(tmp_path) and "<script>" not in page_of(tmp_path)


def test_the_page_shows_progress_curves_pictures_and_settings_and_loads_nothing(tmp_path):
    (tmp_path / "pictures").mkdir()
    for epoch in (1, 5):
        Image.fromarray(np.full((4, 4), epoch, np.uint8)).save(tmp_path / "pictures" / f"epoch_{epoch:04d}.png")
    records = [record(epoch, **{"train/voxels": 1.0, "health/rankme": 100.0}) for epoch in range(5)]
    records[0]["probe/knn_dice"], records[3]["probe/knn_dice"] = 0.25, 0.4375
    RunPage(tmp_path, SETTINGS, records, 25).write()
    page = page_of(tmp_path)
    for text in (
        "MAETrainer on Dataset801_Test",
        "50.0 %",
        "step 25 of 50",
        "epoch 6 of 10",
        "Epoch 5:",
        "Epoch 1:",
        "dddddddddddddddd",
        "torch 2.4",
        "rankme",
        "knn_dice&nbsp;<b>0.4375",
    ):
        assert text in page, text
    assert page.count("<svg") == 7  # loss, probe, parts of the loss, one health metric, learning rate, throughput, waiting
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_the_page_is_rewritten_only_as_often_as_it_may_cost(tmp_path, monkeypatch):
    now, written = [0.0], []
    page = RunPage(tmp_path, SETTINGS, [], 0)
    page.pace.clock = page.inside.clock = lambda: now[0]
    page.pace.next = page.inside.next = 0.0
    write = page.write
    monkeypatch.setattr(page, "write", lambda *state: (written.append(now[0]), write(*state)))
    for step in range(1, 200):
        now[0] += 1.0
        page.advance(step)
    assert len(written) == 7  # every 30 seconds


def test_an_alarm_names_the_epoch_that_raised_it_with_the_meaning_of_the_curves_below(tmp_path):
    page = RunPage(tmp_path, SETTINGS, [record(0, **{"health/projection/std": 0.02, "health/patches/std": 0.9, "health/skipped_steps": 0.0})], 9)
    page.advance(10)  # the last step of the second epoch
    page.alarm("the features have collapsed")
    shown = page_of(tmp_path)
    assert "1 alarm: this training needs a look" in shown and "epoch 2: the features have collapsed" in shown
    assert shown.count("std · √D of normalised vectors") == 1 and "</i>projection&nbsp;" in shown and "</i>patches&nbsp;" in shown


def test_every_health_metric_is_drawn_once_and_unknown_ones_by_themselves():
    wanted = ["health/cls/H_marg", "health/cls/MI", "health/gradient_norm", "health/pooled/std", "health/queue_age"]
    found = grouped([*wanted, "health/pooled/rank_me"])
    assert sorted(name for _, members in found for name in members) == wanted
    assert [(chart.title, chart.meaning) for chart, members in found if "health/queue_age" in members] == [("queue_age", "")]
    assert {chart.label(name) for chart, members in found for name in members} == {"cls/H_marg", "cls", "gradient norm", "pooled", "queue age"}


def test_unusual_names_are_shown_and_not_run(tmp_path):
    RunPage(tmp_path, {**SETTINGS, "dataset": "Dataset801_<script>alert(1)</script>"}, [record(0, **{"health/<b>": 1.0})], 5).close("failed", "<i>x</i>")
    assert not re.search("<script>|<b>:|<i>x", page_of(tmp_path))


def test_metrics_that_are_missing_in_some_epochs_leave_gaps():
    records = [record(0, **{"val/total": None}), record(1), {"epoch": 2, "step": 15, "train/total": None}]
    assert dict(charts(records))["Loss"].count("<polyline") == 2
    assert charts([]) == []


def trainer_of(folder, **config):
    config = dataclasses.replace(MAETrainer.Config(), **config)
    trainer = MAETrainer(make_plan(), "3d_fullres", config, ArrayStore(), folder, family="primus")
    trainer.initialize()
    return trainer


def test_a_run_is_described_so_that_its_command_line_gives_the_same_run(tmp_path):
    trainer = trainer_of(tmp_path, epochs=7, lr=1e-4, mask_ratio=0.6)
    run = describe(trainer)
    assert run["overrides"] == changed(trainer.config) == {"epochs": 7, "lr": 1e-4, "mask_ratio": 0.6}
    assert run["total_steps"] == 7 * 250 and run["cases"] == {"train": 7, "validation": 1} and run["device"] == "cpu" and run["derived"] == {}
    program, *arguments = shlex.split(run["command"])
    options = train.arguments().parse_args([*arguments, "--c"])
    assert program == "nnssl_train" and (options.dataset, options.configuration, options.b, options.device) == ("801", "3d_fullres", "primus", "cpu")
    assert MAETrainer.Config(**parse_overrides(MAETrainer.Config, options.o)) == trainer.config


def test_defaults_stay_out_of_the_command_line():
    run = {**SETTINGS, "overrides": {}, "device": "cuda"}
    assert command(run, "resenc") == "nnssl_train 801 3d_fullres -tr MAETrainer"
    run |= {"plans": "my plans", "processes": 4, "overrides": {"betas": [0.9, 0.98]}, "probe": "901"}
    assert command(run, "primus") == "nnssl_train 801 3d_fullres -tr MAETrainer -p 'my plans' -b resenc -num_gpus 4 -probe 901 -o betas=0.9,0.98"


def test_what_is_measured_in_validation_only_is_no_part_of_the_loss():
    records = [record(epoch, **{"train/dino": 1.0, "val/dino": 1.0, "val/retrieval": 0.3}) for epoch in range(3)]
    drawn = dict(charts(records))
    assert drawn["Quality on validation crops"].count("<polyline") == 1 and drawn["Parts of the loss"].count("<polyline") == 2
