"""Patch k-NN: organs of the test volumes told from frozen features by their nearest labelled neighbours, macro Dice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.learning.data import CONFIGURATION, Data
from benchmarks.learning.pretrain import CHECKPOINT
from benchmarks.phantoms import TokenProbe
from nnssl_ext.benchmark.untrained import fresh_backbone
from nnssl_ext.finetuning.export import load_into_modules
from nnssl_ext.finetuning.pretrained import Pretrained


def trained(settings: dict[str, Any], folder: Path, given: Path | None) -> dict[str, Any]:
    """Of the encoder that a pretraining hands over."""
    assert given is not None
    pretrained = Pretrained.load(given / CHECKPOINT)
    backbone = pretrained.backbone(pretrained.channels, pretrained.config.patch_size)
    load_into_modules(backbone.net, pretrained.weights, pretrained.modules)
    probe = TokenProbe(Data.beside(folder).cohort, pretrained.config.patch_size)
    return _judged(probe, backbone)


def untrained(settings: dict[str, Any], folder: Path, given: Path | None) -> dict[str, Any]:
    """Of the weights that a pretraining with this seed starts from."""
    data = Data.beside(folder)
    plan = data.plan(settings["family"], settings["patch"], 1)
    backbone = fresh_backbone(plan, CONFIGURATION, settings["family"], settings["seed"])
    return _judged(TokenProbe(data.cohort, plan.configuration(CONFIGURATION).patch_size), backbone)


def intensities(settings: dict[str, Any], folder: Path, given: Path | None) -> dict[str, Any]:
    """Of the voxels themselves, in cells as large as those of the encoder's features."""
    data = Data.beside(folder)
    plan = data.plan(settings["family"], settings["patch"], 1)
    backbone, probe = fresh_backbone(plan, CONFIGURATION, settings["family"], 0), TokenProbe(data.cohort, plan.configuration(CONFIGURATION).patch_size)
    cell = backbone.dense_stride
    return {"knn_dice": probe.dice(probe.raw(cell), cell)}


def _judged(probe: TokenProbe, backbone: Any) -> dict[str, Any]:
    return {"knn_dice": probe.dice(probe.tokens(backbone.eval()), backbone.dense_stride)}
