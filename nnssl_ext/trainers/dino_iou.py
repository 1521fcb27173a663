"""DINO on pairs of crops with a controlled IoU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from nnssl_ext.core.plan import Plan
from nnssl_ext.data.augment import DINO
from nnssl_ext.data.checks import distinct_crops
from nnssl_ext.data.loader import Batch
from nnssl_ext.data.overlapping import OverlappingCrops
from nnssl_ext.data.views import ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.dino import DINOModel, PooledNetwork
from nnssl_ext.nn.dinov2 import HeadSize
from nnssl_ext.nn.momentum import distance
from nnssl_ext.planners.primus import local_crop
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.config import AT_LEAST_ONE, SHARE, check_interval
from nnssl_ext.trainers.dinov2_presets import LOWEST_RATE, choose_batch, choose_preset, frozen_steps, head_size, learning_rate
from nnssl_ext.trainers.layer_decay import LAST_LAYER
from nnssl_ext.trainers.optim import RECIPES, Recipe, set_rates
from nnssl_ext.trainers.pair_pictures import pair_rows
from nnssl_ext.trainers.pictures import Rows
from nnssl_ext.trainers.schedules import cosine, linear

FEWEST = 4096  # prototypes, unless the user wants fewer


@dataclass(frozen=True)
class Settings:
    """What a run derives: sizes of the head, the teacher's first and last temperature, steps without update of the prototypes, learning rate."""

    head: HeadSize
    temperatures: tuple[float, float]
    freeze: int
    lr: float


class DINOIoUTrainer(SSLTrainer):
    """A student says of one crop to which prototypes its momentum teacher assigns the other one of the same case; the IoU of the two lies in an interval.

    loss = mean over the pairs of different views (t, s), t one of the two large crops, of -softmax((t - c) / T) . log softmax(s / 0.1),
    where t and s are cosines of a crop's vector and the prototypes, and c is their running mean over the teacher's crops: without
    it all crops would share one prototype. The teacher is handed over.

    Source: Caron et al. 2021, arXiv:2104.14294.
    """

    default_family = "primus"
    recipes: ClassVar[dict[str, Recipe]] = dict.fromkeys(RECIPES, Recipe("adamw", 1e-3, 0.04, 0.1, 3.0, (0.9, 0.999)))
    citation = (
        "Caron, M., Touvron, H., Misra, I., Jégou, H., Mairal, J., Bojanowski, P., & Joulin, A. (2021). "
        "Emerging properties in self-supervised vision transformers. ICCV."
    )

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        iou: tuple[float, ...] = field(default=(0.3, 0.6), metadata=SHARE)  # of the two large crops, lowest and highest; 0,1: crops from anywhere
        locals: int = 0  # small crops around them, which only the student sees
        hidden: int | None = field(default=None, metadata=AT_LEAST_ONE)  # width of the head; None = 2048, at most six times the encoder's
        bottleneck: int | None = field(default=None, metadata=AT_LEAST_ONE)  # where prototypes are; None = 256, at most the encoder's width
        prototypes: int | None = field(default=None, metadata=AT_LEAST_ONE)  # None = 4096, 16384 or 65536, by distinct crops and volumes per step
        teacher_temperature: tuple[float, ...] = ()  # first and last; () = 0.03,0.045 on few crops, else 0.04,0.07
        momentum: tuple[float, ...] = field(default=(0.992, 0.9995), metadata=SHARE)  # of the teacher, first and last
        freeze: int | None = None  # steps without update of the prototypes; None = max(1500, 1 %), at most 10 % of the run

    def __init__(
        self, plan: Plan, configuration: str, config: Config, store: CaseStore, folder: Path | str, *, family: str | None = None, device: str = "cpu"
    ) -> None:
        super().__init__(plan, configuration, config, store, folder, family=family, device=device)
        for name, values in (("iou", config.iou), ("momentum", config.momentum), ("teacher_temperature", config.teacher_temperature or (0.0, 1.0))):
            check_interval(values, name)
        if config.batch_size is None:
            self.batch_size = choose_batch(self.batch_size, plan.gpu_memory_target_gb)
        self.settings = self._derived()
        self.recipe = replace(self.recipe, lr=self.settings.lr)

    def _derived(self) -> Settings:
        config, volumes = self.config, self.batch_size * self.ranks * self.config.accumulate
        preset = choose_preset("auto", distinct_crops(self.store, range(len(self.store)), self.config_plan.patch_size), volumes)
        kwargs = self.network_plan.kwargs
        width = kwargs["embed_dim"] if "embed_dim" in kwargs else kwargs["features_per_stage"][-1]
        return Settings(
            head=head_size(config, width, max(FEWEST, preset.prototypes)),
            temperatures=config.teacher_temperature or preset.temperatures,
            freeze=frozen_steps(self.total_steps) if config.freeze is None else config.freeze,
            lr=learning_rate(volumes, width) if config.lr is None else config.lr,
        )

    def views(self) -> ViewSpec:
        patch = self.config_plan.patch_size
        small = local_crop(patch, self.config_plan.in_volume(self.network_plan.cell))
        return OverlappingCrops(patch, small, self.config.locals, self.config.iou, intensity=DINO)

    def build(self, backbone: Backbone) -> nn.Module:
        return DINOModel(PooledNetwork(backbone, self.settings.head))

    def initialize(self) -> None:
        super().initialize()
        self.health.armed = max(self.health.armed, self.settings.freeze)

    def param_groups(self, model: nn.Module) -> list[dict]:
        prototypes = model.student.head.prototypes  # type: ignore[union-attr]
        groups = [{**group, "params": [p for p in group["params"] if p is not prototypes]} for group in super().param_groups(model)]
        return [*groups, {"params": [prototypes], "weight_decay": self.recipe.weight_decay, "name": LAST_LAYER}]

    def schedule(self, step: int) -> None:
        rate = cosine(step, self.total_steps, self.recipe.lr, LOWEST_RATE, self.warmup_steps)
        set_rates(self.optimizer, rate, frozen=(LAST_LAYER,) if step < self.settings.freeze else ())

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        temperature = linear(self.next_step, self.total_steps, *self.settings.temperatures)
        small = [view.image for name, view in batch.items() if name.startswith("local_")]
        loss, z, said = model(torch.cat((batch["global_0"].image, batch["global_1"].image)), torch.cat(small) if small else None, temperature)
        self.health.add("projection", z)
        self.health.note("teacher_temperature", temperature)
        if self.health.sampling:
            self.health.add_logits("dino", said.plain_logits(slice(None)))
        self.health.note("dino/KL", lambda: loss.detach() - torch.special.entr(said.targets()).sum(1).mean())
        return {"total": loss}

    def after_update(self, step: int) -> None:
        momentum = cosine(step, self.total_steps, *self.config.momentum)
        self.model.update(momentum)
        self.health.note("momentum", momentum)
        self.health.note("teacher_distance", lambda: distance(self.model.student, self.model.teacher.net))

    def picture(self, batch: Batch) -> Rows:
        return pair_rows(self.store, batch["global_0"], batch["global_1"])

    def transferred(self) -> Backbone:
        return self.model.teacher.net.backbone  # type: ignore[no-any-return]
