"""Quick fine-tuning of nnU-Net, with the subsets of the suite and Dice of the test subjects (see `nnssl_ext.benchmark.quick`)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.learning.data import CONFIGURATION, SUBSETS, Data
from benchmarks.learning.pretrain import CHECKPOINT
from nnssl_ext.benchmark import quick
from nnssl_ext.benchmark.untrained import untrained
from nnssl_ext.evaluation.anatomy import LABELS
from nnssl_ext.evaluation.demo_data import PHANTOM_SET
from nnssl_ext.finetuning.plans import PlanOptions, write_plans
from nnssl_ext.finetuning.pretrained import Pretrained


def finetune(settings: dict[str, Any], folder: Path, given: Path | None) -> dict[str, Any]:
    """Fine-tune the checkpoint in `given`, or train from scratch without one; Dice of the test subjects.

    Args:
        settings: "family", "patch", "seed", "labels" and "training" (a `FineTuning`).
    """
    data, training, seed = Data.beside(folder), settings["training"], settings["seed"]
    plan = data.plan(settings["family"], settings["patch"], training["batch"])
    checkpoint = given / CHECKPOINT if given is not None else untrained(plan, CONFIGURATION, settings["family"], seed, folder / "untrained.pth")
    with quick.workplace(data.folders, PHANTOM_SET, folder, **quick.short(training["epochs"], training["iterations"])):
        pretrained = Pretrained.load(checkpoint)
        plans = write_plans(pretrained, PHANTOM_SET, PlanOptions(batch_size=training["batch"]))
        shutil.copy(data.splits, plans.parent / "splits_final.json")  # in place of that of the dataset, which nnU-Net brings along
        trainer = quick.make_trainer(plans, PHANTOM_SET, CONFIGURATION, training["trainer"], SUBSETS.index(settings["labels"]), seed)
        if given is not None:
            quick.load_pretrained(trainer, pretrained, plans, CONFIGURATION, seed, folder / "weights.pth")
        losses = quick.train(trainer, seed)
        return {"losses": losses, **_test(trainer, data)}


def _test(trainer: Any, data: Data) -> dict[str, Any]:
    """Dice of each test subject, with nnU-Net's preprocessing and sliding window, without mirroring."""
    predictor, manager, configuration = quick.predictor_of(trainer), trainer.plans_manager, trainer.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=False)
    found = {}
    for labels in sorted((data.labelled / "labelsTs").glob("*.nii.gz")):
        case = labels.name.removesuffix(".nii.gz")
        image = data.labelled / "imagesTs" / f"{case}_0000.nii.gz"
        volume, known, _ = preprocessor.run_case([str(image)], str(labels), manager, configuration, trainer.dataset_json)
        predicted = predictor.predict_sliding_window_return_logits(torch.as_tensor(volume)).argmax(0).numpy()
        found[case] = dice(predicted, known[0])
    cases = {case: float(np.mean(list(values.values()))) for case, values in found.items()}
    return {"dice": float(np.mean(list(cases.values()))), "cases": cases, "labels": found}


def dice(predicted: np.ndarray, known: np.ndarray) -> dict[str, float]:
    """Dice of each organ that the reference holds."""
    values = {}
    for name, label in LABELS.items():
        one, other = predicted == label, known == label
        if label > 0 and other.any():
            values[name] = 2 * int((one & other).sum()) / int(one.sum() + other.sum())
    return values
