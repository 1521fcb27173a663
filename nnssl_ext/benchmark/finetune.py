"""Unit of work: fine-tuning a checkpoint with some labelled cases, or training from scratch with them, and judging the test cases."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.benchmark import quick
from nnssl_ext.benchmark.data import Data
from nnssl_ext.benchmark.pictures import draw_overlay
from nnssl_ext.benchmark.pretrain import CHECKPOINT
from nnssl_ext.core.files import read_json
from nnssl_ext.evaluation.segmentation_metrics import METRICS, evaluate
from nnssl_ext.finetuning.commands import FOLDERS, Machine, finetune, hand_off
from nnssl_ext.finetuning.plans import PlanOptions, default_configuration, write_plans
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.finetuning.trainers import trainer_name

FOLD = "all"  # nothing is chosen by validation, and every labelled case can be trained on
TOLERANCE = 2.0  # of the NSD, mm
PREDICTIONS = "predictions"
NAMES = {"dice": "dice", "nsd": "nsd", "hd95": "hd95_mm"}


def finetuned(settings: dict[str, Any], folder: Path, given: Path | None) -> dict[str, Any]:
    """Figures of each test case.

    Args:
        settings: "dataset", "mode", "labels", "seed", "scratch" (take only the network of the checkpoint), "quick" (a `Quick`, or None for nnU-Net's
            own commands, with "trainer", and "variables" of the environment that it reads) and "device".
        folder: of the unit.
        given: folder with the checkpoint.
    """
    assert given is not None
    data, dataset, how = Data.beside(folder), settings["dataset"], settings["quick"]
    variables = settings["variables"] if how is None else quick.short(how["epochs"], how["iterations"])
    alone = how is not None or settings["device"] == "cpu"  # a card would wait for one process
    with quick.workplace(data.record["folders"], dataset, folder, alone, **variables):
        pretrained = Pretrained.load(given / CHECKPOINT)
        options = PlanOptions(default_configuration(pretrained), mode=settings["mode"], cases=settings["labels"], batch_size=how and how["batch"])
        curves = {}
        if how is None:
            _with_commands(pretrained, settings, options, folder / PREDICTIONS)
        else:
            curves = {"train/total": _in_process(pretrained, settings, options, folder)}
        for name in FOLDERS[1:]:
            shutil.rmtree(folder / name, ignore_errors=True)
    cases = judged(folder / PREDICTIONS, data.raw(dataset))
    caption = draw_overlay(folder / "overlay.png", folder / PREDICTIONS, data.raw(dataset))
    figures = {name: _mean([case[name] for case in cases.values()]) for name in NAMES.values()}
    return {"runs": [{"cases": cases, "figures": figures, "curves": curves, "pictures": {caption: "overlay.png"}}]}


def _in_process(pretrained: Pretrained, settings: dict[str, Any], options: PlanOptions, folder: Path) -> list[list[float]]:
    """Write the predictions; the mean loss of each epoch, with its last step."""
    plans, name, seed = write_plans(pretrained, settings["dataset"], options), trainer_name(pretrained.family, "short"), settings["seed"]
    trainer = quick.make_trainer(plans, settings["dataset"], options.configuration, name, FOLD, seed, settings["device"])
    if not settings["scratch"]:
        weights = folder / "weights.pth"
        quick.load_pretrained(trainer, pretrained, plans, options.configuration, seed, weights)
        weights.unlink()
    losses = quick.train(trainer, seed)
    quick.predict(trainer, Data.beside(folder).raw(settings["dataset"]) / "imagesTs", folder / PREDICTIONS)
    return [[(epoch + 1) * trainer.num_iterations_per_epoch, loss] for epoch, loss in enumerate(losses)]


def _with_commands(pretrained: Pretrained, settings: dict[str, Any], options: PlanOptions, out: Path) -> None:
    """The same by nnU-Net's own programs, whose random numbers nobody can seed: the seed only counts the repetitions."""
    handoff = hand_off(pretrained, settings["dataset"], options, settings["trainer"], fold=FOLD)
    if settings["scratch"]:
        handoff = replace(handoff, weights=None)
    finetune(handoff, Machine(settings["device"]), FOLD)
    shutil.move(str(handoff.results / f"imagesTs_fold_{FOLD}"), out)


def judged(predictions: Path, raw: Path) -> dict[str, dict[str, Any]]:
    """Figures of each test case, means over its labels, and those of each label under "labels"; None where there is none."""
    (found,) = evaluate([predictions], raw / "labelsTs", TOLERANCE)
    names = {number: name for name, number in read_json(raw / "dataset.json")["labels"].items() if isinstance(number, int)}
    by_case: dict[str, dict[str, dict[str, float | None]]] = {}
    for (case, label), values in found.items():
        by_case.setdefault(case, {})[names.get(label, str(label))] = {NAMES[metric]: _mean([values[metric]]) for metric in METRICS}
    return {
        case: {**{name: _mean([values[name] for values in labels.values()]) for name in NAMES.values()}, "labels": labels} for case, labels in by_case.items()
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.mean(known)) if known else None
