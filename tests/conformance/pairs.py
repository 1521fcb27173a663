"""Every pretraining method with every backbone family that it can train, as runs of seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from nnssl_ext.core.registry import PLUGIN_VARIABLE, all_classes
from nnssl_ext.data.loader import Batch
from nnssl_ext.nn.backbones.base import Backbone, families
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.initial import Initial
from tests.make_data import TINY, PairedStore, slice_plan, tiny_plan, tiny_store
from tests.toy_trainers import ToyTrainer

STEPS = 20
OPTIONS: Mapping[str, Mapping[str, Any]] = {  # hyper-parameters that make a method small, by trainer
    "DINOv2Trainer": (DINO := {"prototypes": 32, "hidden": 32, "bottleneck": 16, "locals": 2}),
    "DINOv2HighResTrainer": DINO,
    "DINOIoUTrainer": DINO,
    "VoCoTrainer": {"hidden": 32},
    "CroCo3DTrainer": {"decoder_depth": 2, "decoder_width": 64},
    "SimCLRTrainer": {"hidden": 32},
    "SimSiamIoUTrainer": {"hidden": 32, "bottleneck": 16},
    "PatchClusterTrainer": {"prototypes": 8, "bottleneck": 16},
    "BilateralDenseContrastTrainer": {"voxels": 27, "hidden": 32, "bottleneck": 16},
}
STORES: Mapping[str, Callable[..., Any]] = {"MultiMAETrainer": PairedStore}  # cases that a method needs, by trainer; of others `tiny_store`
EARLIER: Mapping[str, str] = {"DINOv2HighResTrainer": "DINOv2Trainer"}  # whose weights a method goes on from, by trainer


@dataclass(frozen=True)
class Pair:
    """A method and a backbone family.

    Args:
        cls: the trainer.
        family: name of the backbone family.
        slices: whether it trains on slices.
    """

    cls: type[SSLTrainer]
    family: str
    slices: bool = False

    @property
    def method(self) -> str:
        return self.cls.__name__

    def __str__(self) -> str:
        return f"{self.method}-{self.family}{'-slices' * self.slices}"

    def supported(self) -> bool:
        return any(need <= families()[self.family].supports for need in self.cls.needs)

    def trainer(
        self, folder: Path, *, float64: bool = False, channels: int = 1, patch: tuple[int, int, int] = (16, 16, 16), store: Any = None, **options: Any
    ) -> SSLTrainer:
        """A run of STEPS steps in four epochs, on tiny volumes.

        Args:
            folder: of its results.
            float64: the whole model and its input in fp64.
            channels: of every case.
            patch: voxels of a crop.
            store: the cases; None = those of `STORES`.
            options: hyper-parameters that differ.
        """
        small = {"epochs": 4, "iterations": STEPS // 4, "val_iterations": 1, "batch_size": 2, "workers": 0, **OPTIONS.get(self.method, {}), **options}
        cls = in_float64(self.cls) if float64 else self.cls
        plan, cases = slice_plan(channels) if self.slices else tiny_plan(channels, patch), store or STORES.get(self.method, tiny_store)(channels=channels)
        trainer: SSLTrainer = cls(plan, "2d" if self.slices else "3d_fullres", cls.Config(**small), cases, folder, family=self.family)
        if self.method in EARLIER:
            identity = {"file": "earlier.pth", "sha256": "0" * 64, "method": EARLIER[self.method], "step": 0}
            trainer.init = Initial(identity, untrained(EARLIER[self.method], self.family, channels))
        return trainer


@cache
def untrained(method: str, family: str, channels: int) -> dict[str, Any]:
    """Content of a checkpoint before the first step."""
    trainer = Pair(METHODS[method], family).trainer(Path("unused"), channels=channels)
    trainer.initialize()
    return trainer.state()


def registered() -> dict[str, type[SSLTrainer]]:
    """The package's own methods by name."""
    with patch.dict(os.environ):
        os.environ.pop(PLUGIN_VARIABLE, None)
        return all_classes(SSLTrainer, "nnssl_ext.trainers")


METHODS: dict[str, type[SSLTrainer]] = {**registered(), **{cls.__name__: cls for cls in ToyTrainer.__subclasses__()}}
EVERY = [Pair(cls, family) for cls in METHODS.values() for family in sorted(TINY)]
PAIRS = [pair for pair in EVERY if pair.supported()]
SLICES = [Pair(METHODS[name], "resenc", slices=True) for name in ("SimCLRTrainer", "SimSiamIoUTrainer", "DINOIoUTrainer")]


def own_family(pairs: list[Pair]) -> list[Any]:
    """Parameters of a test of seconds: every method with its own family in the default tests, with the others where there is time for all."""
    return [pair if pair.family == pair.cls.default_family else pytest.param(pair, marks=pytest.mark.slow) for pair in pairs]


def in_float64(cls: type[SSLTrainer]) -> type[SSLTrainer]:
    """The method with its model and its views in fp64, also while weights are drawn: one rounding in fp32 grows a thousandfold within 30 steps.

    Its attribute `trace` holds the total loss of every training batch.
    """

    class Double(cls):  # type: ignore[misc,valid-type]
        def initialize(self) -> None:
            former = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)
            try:
                super().initialize()
            finally:
                torch.set_default_dtype(former)
            self.model.double()
            self.trace: list[float] = []

        def step(self, model: nn.Module, batch: Batch) -> Losses:
            losses: Losses = super().step(model, {name: replace(view, image=view.image.double()) for name, view in batch.items()})
            if model.training:
                self.trace.append(float(losses["total"].detach()))
            return losses

    Double.__name__ = Double.__qualname__ = cls.__name__
    return Double


@contextmanager
def features_of(backbone: Backbone) -> Iterator[list[Tensor]]:
    """Everything that a backbone computes meanwhile."""
    features: list[Tensor] = []

    def keeping(method: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*arguments: Any, **keywords: Any) -> Any:
            result = method(*arguments, **keywords)
            features.extend(result if isinstance(result, list) else [result])
            return result

        return kept

    for name in ("tokens", "pyramid"):
        setattr(backbone, name, keeping(getattr(backbone, name)))
    try:
        yield features
    finally:
        for name in ("tokens", "pyramid"):
            delattr(backbone, name)


def first_batch(trainer: SSLTrainer, step: int = 0) -> Batch:
    """The training batch of a step."""
    return {name: view.to(trainer.device) for name, view in trainer._dataset(trainer.train_cases, "train")[step].items()}
