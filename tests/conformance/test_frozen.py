"""What others build on changes only with a new version; files of the first version are still read."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from nnssl_ext.core.plan import Plan
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.nn.backbones.base import build_backbone
from nnssl_ext.trainers.checkpoint import adaptation_plan, load_checkpoint
from nnssl_ext.trainers.mae import MAETrainer
from tests.conformance.freeze import FROZEN, differences, snapshot
from tests.make_data import tiny_store

V1 = Path(__file__).parent / "v1"


def test_commands_checkpoints_and_plans_are_the_frozen_ones():
    changed = differences(json.loads(FROZEN.read_text(encoding="utf-8")), json.loads(json.dumps(snapshot())))
    hint = "bump the version where something is gone or changed, add a line to CHANGELOG.md, then: python -m tests.conformance.freeze"
    assert not changed, "\n".join([*changed[:30], hint])


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({"a": {"-d": "x"}}, {"a": {}}, ["/a/-d: gone"]),
        ({"a": 1}, {"a": 1, "b": 2}, ["/b: new"]),
        ({"a": {"w": "float32 [2]"}}, {"a": {"w": "float32 [3]"}}, ["/a/w: float32 [2] -> float32 [3]"]),
        ({"a": 1}, {"a": 1}, []),
    ],
)
def test_what_changed_is_told(before, now, told):
    assert differences(before, now) == told


def test_a_plan_of_the_first_version_is_read_and_builds_its_networks():
    plan = Plan.load(V1 / "nnsslPlans.json")
    config = plan.configuration("3d_fullres")
    for family in ("resenc", "primus"):
        backbone = build_backbone(config, family, plan.channels)
        assert backbone.pooled(torch.zeros(1, plan.channels, *config.patch_size)).shape == (1, backbone.widths[-1])


def test_a_checkpoint_of_the_first_version_goes_on_training(tmp_path):
    shutil.copy(V1 / "checkpoint_latest.pth", tmp_path)
    content = load_checkpoint(tmp_path / "checkpoint_latest.pth")
    config = {key: value for key, value in content["config"].items() if value is not None}
    trainer = MAETrainer(Plan.from_dict(content["plan"]), "3d_fullres", MAETrainer.Config(**config), tiny_store(), tmp_path, family=content["family"])
    trainer.fit(resume=True)
    final = load_checkpoint(tmp_path / "checkpoint_final.pth")
    assert content["step"] == 3 and final["step"] == 4 and final["network_weights"].keys() == content["network_weights"].keys()


def test_an_adaptation_plan_of_the_first_version_says_the_same_today_and_is_handed_over():
    kept = json.loads((V1 / "adaptation_plan.json").read_text(encoding="utf-8"))
    pretrained = Pretrained.load(V1 / "checkpoint_latest.pth")
    backbone = build_backbone(pretrained.config, pretrained.family, pretrained.channels)
    assert kept == pretrained.adaptation == adaptation_plan(backbone, pretrained.config, pretrained.configuration).as_dict()
    fresh = backbone.network_weights()
    assert set(pretrained.weights) >= {key for key in fresh if key.startswith("encoder.")}
    assert all(fresh[key].shape == value.shape for key, value in pretrained.weights.items())
