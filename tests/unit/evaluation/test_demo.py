"""The demo runs the commands of the README, and its page shows the health of the pretraining."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nnssl_ext.evaluation import demo
from nnssl_ext.evaluation.demo import Demo

README = Path(__file__).parents[3] / "README.md"


class Recorded(Demo):
    """Notes the commands and leaves the files that the real ones would leave."""

    def call(self, *command: str) -> str:
        self.commands.append((shlex.join(command), 0.0))
        left = {
            "nnssl_train": "nnssl_results/Dataset801_TorsoCohort/run/fold_all/checkpoint_final.pth",
            "nnssl_export": "nnUNet_preprocessed/Dataset901_TorsoOrgans/nnssl_DINOv2_1234.json",
        }
        if command[0] in left:
            path = self.folder / left[command[0]]
            path.parent.mkdir(parents=True)
            path.touch()
        if command[0] == "nnssl_export":
            (self.folder / "exported").mkdir()
            (self.folder / "exported" / "weights.pth").touch()
        return ""

    def predict(self, name, plans):
        return {}

    def page(self, run, report, scores):
        return self.folder / "index.html"


def test_the_demo_runs_the_three_commands_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "make_demo_data", lambda *arguments, **keywords: {})
    recorded = Recorded(tmp_path / "demo", phantom=False)
    recorded.run()
    block = README.read_text(encoding="utf-8").partition("## Three commands")[2].partition("```\n")[2].partition("```")[0]
    commands = [line.partition("#")[0].strip() for line in block.splitlines() if line]
    assert len(commands) == 3
    for command in commands:
        pattern = re.sub(r"\b[A-Z]{4,}\b", r"\\S+", re.escape(command))  # PLANS and CKPT are placeholders
        assert any(re.match(pattern + r"(?: |$)", run) for run, _ in recorded.commands), command


@pytest.mark.parametrize("alarms", [[], ["the features have collapsed"]])
def test_the_page_shows_curves_pictures_and_alarms_of_the_pretraining(tmp_path, alarms):
    (tmp_path / "pictures").mkdir()
    for name in ("progress", "pictures/epoch_0001", "pictures/epoch_0002"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / f"{name}.png")
    settings = {"trainer": "DINOv2Trainer", "family": "primus", "cases": {"train": 20, "validation": 4}, "total_steps": 250, "batch_size": 4}
    (tmp_path / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    records = [{"epoch": epoch, "step": 5 + 5 * epoch, "health/dino/MI": 0.5, "health/summary/std": 0.9} for epoch in range(2)]
    records[1]["alarms"] = alarms
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    pretraining, health = demo._pretraining(tmp_path)
    assert [part["kind"] for part in pretraining.parts] == ["text", "image", "image", "image"] and "250 steps of 4 volumes" in pretraining.parts[0]["text"]
    (charts,) = (part["charts"] for part in health.parts if part["kind"] == "charts")
    assert {title for title, _, _ in charts} == {"Spread of the features", "Information about the image"} and all("<svg" in svg for _, _, svg in charts)
    shown = json.dumps(health.parts)
    assert (
        ("No alarm was raised" in shown) == (not alarms)
        and ("1 alarm was raised" in shown) == bool(alarms)
        and ("Epoch 2: the features have collapsed" in shown) == bool(alarms)
    )
