"""Checkpoints before the first step: what random weights and training from scratch are told by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nnssl_ext.core.plan import Plan
from nnssl_ext.core.rng import torch_seed
from nnssl_ext.nn.backbones.base import Backbone, build_backbone
from nnssl_ext.trainers.checkpoint import adaptation_plan, save_checkpoint


def fresh_backbone(plan: Plan, configuration: str, family: str, seed: int) -> Backbone:
    """The backbone that a pretraining with this seed starts from."""
    torch.manual_seed(torch_seed(seed, 0, "init"))
    return build_backbone(plan.configuration(configuration), family, plan.channels)


def untrained(plan: Plan, configuration: str, family: str, seed: int, path: Path) -> Path:
    """A checkpoint before the first step, which names the network and its plan for what is not pretrained."""
    backbone = fresh_backbone(plan, configuration, family, seed)
    content: dict[str, Any] = {"trainer_name": "Untrained", "family": family, "configuration": configuration, "plan": plan.as_dict(), "config": {}, "step": 0}
    content |= {"transfer": "encoder", "network_weights": backbone.network_weights(), "citations": []}
    content["nnssl_adaptation_plan"] = adaptation_plan(backbone, plan.configuration(configuration), configuration).as_dict()
    save_checkpoint(path, content)
    return path
