"""Quick fine-tuning: nnU-Net's own trainer and predictor in this process, for a given number of iterations.

The weights go through the export that users get. Training from scratch differs from fine-tuning in nothing but the pretrained tensors:
the same plan, seed, batches and first weights of all the rest.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

from benchmarks.learning.data import CONFIGURATION, FOLDERS, SUBSETS, Data, nnunet_environment, untrained
from benchmarks.learning.pretrain import CHECKPOINT
from nnssl_ext.core.rng import torch_seed
from nnssl_ext.evaluation.anatomy import LABELS
from nnssl_ext.evaluation.demo_data import PHANTOM_SET
from nnssl_ext.finetuning.export import TRAINER_FOLDER, Target, export_nnunet
from nnssl_ext.finetuning.plans import PlanOptions, write_plans
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.finetuning.trainers import EPOCHS_VARIABLE, ITERATIONS_VARIABLE

CPU = torch.device("cpu")


def finetune(settings: dict[str, Any], folder: Path, given: Path | None) -> dict[str, Any]:
    """Fine-tune the checkpoint in `given`, or train from scratch without one; Dice of the test subjects.

    Args:
        settings: "family", "patch", "seed", "labels" and "training" (a `FineTuning`).
    """
    data, training, seed = Data.beside(folder), settings["training"], settings["seed"]
    plan = data.plan(settings["family"], settings["patch"], training["batch"])
    checkpoint = given / CHECKPOINT if given is not None else untrained(plan, settings["family"], seed, folder / "untrained.pth")
    with _workplace(data, folder, training):
        pretrained = Pretrained.load(checkpoint)
        plans = write_plans(pretrained, PHANTOM_SET, PlanOptions(batch_size=training["batch"]))
        shutil.copy(data.splits, plans.parent / "splits_final.json")  # in place of that of the dataset, which nnU-Net brings along
        target = Target(plans, CONFIGURATION, training["trainer"])
        trainer = get_trainer_from_args(PHANTOM_SET, CONFIGURATION, SUBSETS.index(settings["labels"]), training["trainer"], plans.stem, False, CPU)
        trainer.initialize()
        trainer.network.load_state_dict(target.build(seed).state_dict())
        if given is not None:
            weights = folder / "weights.pth"
            export_nnunet(pretrained, plans, CONFIGURATION, weights, training["trainer"], seed)
            maybe_load_checkpoint(trainer, False, False, str(weights))
        losses = _train(trainer, seed)
        return {"losses": losses, **_test(trainer, data)}


@contextmanager
def _workplace(data: Data, folder: Path, training: dict[str, Any]) -> Iterator[None]:
    """nnU-Net's folders for one run alone: runs side by side write their plans into folders of their own, and share the cases."""
    folders = {**{name: data.nnunet(name) for name in FOLDERS}, **{name: folder / name for name in FOLDERS[1:]}}
    shared, own = data.nnunet("nnUNet_preprocessed") / PHANTOM_SET, folder / "nnUNet_preprocessed" / PHANTOM_SET
    own.mkdir(parents=True)
    for path in shared.iterdir():
        if path.is_dir() or path.name == "dataset_fingerprint.json":
            (own / path.name).symlink_to(path.resolve(), path.is_dir())
    short = {EPOCHS_VARIABLE: str(training["epochs"]), ITERATIONS_VARIABLE: str(training["iterations"]), "nnUNet_extTrainer": str(TRAINER_FOLDER)}
    with nnunet_environment(folders, **short):
        yield


def _train(trainer: Any, seed: int) -> list[float]:
    """nnU-Net's training loop without validation, curves and checkpoints; the mean loss of each epoch."""
    trainer.plot_network_architecture = lambda: None
    trainer.on_train_start()
    _steady(trainer.dataloader_train.data_loader.transforms)
    seed_all(seed)
    losses = []
    for epoch in range(trainer.num_epochs):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        losses.append(float(np.mean([trainer.train_step(next(trainer.dataloader_train))["loss"] for _ in range(trainer.num_iterations_per_epoch)])))
    return losses


def _steady(transforms: Any) -> None:
    """The blur measures which of two ways is faster, which rounds differently from run to run; take one."""
    for transform in transforms.transforms:
        inner = getattr(transform, "transform", transform)
        if hasattr(inner, "benchmark"):
            inner.benchmark = False


def seed_all(seed: int) -> None:
    """All generators that nnU-Net's loader and augmentation draw from."""
    number = torch_seed(seed, 0, "finetune")
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 (nnU-Net draws from it)
    torch.manual_seed(number)


def _test(trainer: Any, data: Data) -> dict[str, Any]:
    """Dice of each test subject, with nnU-Net's preprocessing and sliding window, without mirroring."""
    predictor = nnUNetPredictor(use_mirroring=False, device=CPU, allow_tqdm=False)
    trainer.set_deep_supervision_enabled(False)
    manager, configuration = trainer.plans_manager, trainer.configuration_manager
    predictor.manual_initialization(trainer.network, manager, configuration, None, trainer.dataset_json, type(trainer).__name__, None)
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
