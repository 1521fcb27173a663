"""Quick fine-tuning: nnU-Net's own trainer and predictor in this process, for a given number of iterations.

The weights go through the export that users get. Training from scratch differs from fine-tuning in nothing but the pretrained tensors:
the same plan, seed, batches and first weights of all the rest.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

from nnssl_ext.benchmark.data import folders
from nnssl_ext.core.rng import torch_seed
from nnssl_ext.finetuning.commands import FOLDERS
from nnssl_ext.finetuning.export import Target, export_nnunet
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.finetuning.trainers import EPOCHS_VARIABLE, ITERATIONS_VARIABLE


@contextmanager
def workplace(shared: dict[str, str], dataset: str, folder: Path, alone: bool = True, **more: str) -> Iterator[None]:
    """nnU-Net's folders for one run alone: runs side by side write their plans into folders of their own, and share the preprocessed cases.

    Args:
        shared: folders by their environment variables.
        dataset: `DatasetXXX_NAME`.
        folder: of the run.
        alone: one process for everything.
        more: further environment variables.
    """
    cases, own = Path(shared[FOLDERS[1]]) / dataset, folder / FOLDERS[1] / dataset
    own.mkdir(parents=True)
    for path in cases.iterdir():
        if path.is_dir() or path.name == "dataset_fingerprint.json":
            (own / path.name).symlink_to(path.resolve(), path.is_dir())
    with folders({**shared, **{name: str(folder / name) for name in FOLDERS[1:]}}, alone, **more):
        yield


def short(epochs: int, iterations: int) -> dict[str, str]:
    """Environment variables of our short trainers."""
    return {EPOCHS_VARIABLE: str(epochs), ITERATIONS_VARIABLE: str(iterations)}


def make_trainer(plans: Path, dataset: str, configuration: str, trainer: str, fold: int | str, seed: int, device: str = "cpu") -> Any:
    """nnU-Net's trainer with a network whose first weights `seed` determines."""
    made = get_trainer_from_args(dataset, configuration, fold, trainer, plans.stem, False, torch.device(device))
    made.initialize()
    made.network.load_state_dict(Target(plans, configuration, trainer).build(seed).state_dict())
    return made


def load_pretrained(trainer: Any, pretrained: Pretrained, plans: Path, configuration: str, seed: int, weights: Path) -> None:
    """Bring a checkpoint's tensors into a trainer's network, as nnU-Net's command does; `weights` is written for it."""
    export_nnunet(pretrained, plans, configuration, weights, type(trainer).__name__, seed)
    maybe_load_checkpoint(trainer, False, False, str(weights))


def train(trainer: Any, seed: int) -> list[float]:
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


def predictor_of(trainer: Any) -> nnUNetPredictor:
    """nnU-Net's sliding window with a trainer's network, without mirroring."""
    predictor = nnUNetPredictor(use_mirroring=False, device=trainer.device, perform_everything_on_device=trainer.device.type == "cuda", allow_tqdm=False)
    trainer.set_deep_supervision_enabled(False)
    manager, configuration = trainer.plans_manager, trainer.configuration_manager
    predictor.manual_initialization(trainer.network, manager, configuration, [trainer.network.state_dict()], trainer.dataset_json, type(trainer).__name__, None)
    return predictor


def predict(trainer: Any, images: Path, out: Path) -> None:
    """Write the label map of every case of a folder of images."""
    out.mkdir(parents=True, exist_ok=True)
    predictor_of(trainer).predict_from_files_sequential(str(images), str(out))
