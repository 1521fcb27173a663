"""DINOv2 in 3D: self-distillation of whole crops and of hidden tokens, on Primus."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from nnssl_ext.core.plan import Plan
from nnssl_ext.data.augment import DINO
from nnssl_ext.data.checks import check_normalized, distinct_crops
from nnssl_ext.data.loader import Batch
from nnssl_ext.data.masking import MaskedMultiCrop
from nnssl_ext.data.views import MultiCrop, ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.backbones.primus import PrimusBackbone
from nnssl_ext.nn.dinov2 import ROWS, Crops, DINOv2Model, Network, Output
from nnssl_ext.nn.momentum import distance
from nnssl_ext.planners.primus import local_crop
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.config import AT_LEAST_ONE, SHARE
from nnssl_ext.trainers.dinov2_presets import LOWEST_RATE, choose_batch, settle, with_registers
from nnssl_ext.trainers.layer_decay import LAST_LAYER, layer_groups
from nnssl_ext.trainers.optim import Recipe, set_rates
from nnssl_ext.trainers.retrieval import view_retrieval
from nnssl_ext.trainers.schedules import cosine, linear


class DINOv2Trainer(SSLTrainer):
    """A student learns from its momentum teacher: summaries across views (DINO), hidden tokens (iBOT), spread (KoLeo).

    Source: Oquab et al. 2023, arXiv:2304.07193; Zhou et al. 2021, arXiv:2111.07832 (iBOT); Wald et al. 2025, arXiv:2503.01835 (Primus).
    """

    default_family = "primus"
    needs = (frozenset({"mask_token", "any_size"}),)
    recipes: ClassVar[dict[str, Recipe]] = {family: Recipe("adamw", 1e-3, 0.04, 0.1, 3.0, (0.9, 0.999)) for family in ("primus", "primus_v2")}
    citation = (
        "Oquab, M., Darcet, T., Moutakanni, T., Vo, H., Szafraniec, M., Khalidov, V., ... Bojanowski, P. (2024). "
        "DINOv2: Learning robust visual features without supervision. TMLR."
    )

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        preset: str = "auto"  # "small", "default", "large": of what is None below; "auto" = by distinct crops and volumes per step
        locals: int | None = None  # local crops per volume; None = 8, 4 where memory is below 12 GB
        global_share: tuple[float, ...] = (0.25, 1.0)  # of the sampling box that a global crop shows, by volume
        local_share: tuple[float, ...] = (0.03, 0.25)
        prototypes: int | None = field(default=None, metadata=AT_LEAST_ONE)  # of each head
        hidden: int | None = field(default=None, metadata=AT_LEAST_ONE)  # width of the heads; None = 2048, at most six times the encoder's
        bottleneck: int | None = field(default=None, metadata=AT_LEAST_ONE)  # where prototypes are; None = 256, at most the encoder's width
        centring: str = "auto"  # "centre", "sinkhorn", "none"; "auto" = centre below 128 global crops per step
        teacher_temperature: tuple[float, ...] = ()  # first and last; () = the preset's
        temperature_ramp: float = field(default=1.0, metadata=SHARE)  # share of the steps over which it rises
        momentum: tuple[float, ...] = (0.992, 0.9995)  # of the teacher, first and last
        last_weight_decay: float = 0.2  # the first is weight_decay; half a cosine
        freeze: int | None = None  # steps without update of the prototypes; None = max(1500, 1 %), at most 10 % of the run
        layer_decay: float | None = field(default=None, metadata=SHARE)  # of the learning rate per block; None = by depth
        mask_probability: float = field(default=0.5, metadata=SHARE)  # share of the global crops with hidden tokens
        mask_ratio: tuple[float, ...] = (0.3, 0.6)  # range of their share of hidden tokens
        ibot_weight: float = 1.0
        koleo_weight: float = 0.1  # 0 below 16 volumes per step
        unmasked_pass: bool = False  # the summaries from a pass of their own over whole crops: dearer, sometimes steadier
        registers: int = 0  # learned tokens beside the patches'; the exported network has them too
        class_token: bool = False  # the first register is the summary (one is added where there is none), instead of attention on top
        gram: float = 0.0  # weight of the distance to the similarities of tokens that the anchor has, a copy of the teacher
        gram_start: float = field(default=0.75, metadata=SHARE)  # share of the epochs after which it is taken

    def __init__(
        self, plan: Plan, configuration: str, config: Config, store: CaseStore, folder: Path | str, *, family: str | None = None, device: str = "cpu"
    ) -> None:
        plan = with_registers(plan, configuration, family or self.default_family, max(config.registers, int(config.class_token)))
        super().__init__(plan, configuration, config, store, folder, family=family, device=device)
        if config.batch_size is None:
            self.batch_size = choose_batch(self.batch_size, plan.gpu_memory_target_gb)
        self.settings = settle(
            config,
            crops=distinct_crops(store, range(len(store)), self.config_plan.patch_size),
            volumes=self.batch_size * self.ranks,
            width=self.network_plan.kwargs["embed_dim"],
            memory_gb=plan.gpu_memory_target_gb,
            steps=self.total_steps,
        )
        self.recipe = replace(self.recipe, lr=self.settings.lr)
        self.gram_step = round(config.gram_start * config.epochs) * config.iterations

    def views(self) -> ViewSpec:
        config, patch, token = self.config, self.config_plan.patch_size, self.network_plan.kwargs["patch_embed_size"]
        crops = MultiCrop(patch, local_crop(patch, token), self.settings.locals, config.global_share, config.local_share, intensity=DINO)
        return MaskedMultiCrop(crops, tuple(token), config.mask_probability, config.mask_ratio)

    def build(self, backbone: Backbone) -> nn.Module:
        assert isinstance(backbone, PrimusBackbone)
        student = Network(backbone, self.network_plan.kwargs["eva_numheads"], self.settings.heads, self.config.class_token)
        return DINOv2Model(student, self.settings.centring, self.config.unmasked_pass, self.config.gram > 0)

    def initialize(self) -> None:
        super().initialize()
        self.health.armed = max(self.health.armed, self.settings.freeze)
        check_normalized(self.store, self.train_cases)
        if self.rank == 0:
            print(self.settings.sentence())

    def param_groups(self, model: nn.Module) -> list[dict]:
        student: Any = model.student
        layers = [*student.backbone.layer_ids(), (student.mask_token, 0)]
        prototypes = [student.dino_head.prototypes, student.ibot_head.prototypes]
        stem = student.backbone.net.down_projection
        return layer_groups(student, layers, stem, self.recipe.weight_decay, last_layers=prototypes, decay=self.config.layer_decay)

    def schedule(self, step: int) -> None:
        if step == self.gram_step:
            self.model.take_anchor()
        rate = cosine(step, self.total_steps, self.recipe.lr, LOWEST_RATE, self.warmup_steps)
        decay = cosine(step, self.total_steps, self.recipe.weight_decay, self.config.last_weight_decay)
        set_rates(self.optimizer, rate, decay, frozen=(LAST_LAYER,) if step < self.settings.freeze else ())

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        temperature = linear(self.next_step, round(self.config.temperature_ramp * self.total_steps), *self.settings.temperatures)
        anchored = self.config.gram > 0 and self.next_step - (not model.training) >= self.gram_step
        output = model(Crops.of(batch), temperature, self.config.mask_ratio[1] if anchored else None)
        warm = min(1.0, (self.next_step + 1) / max(1, self.warmup_steps))
        weights = {"dino": 1.0, "ibot": self.config.ibot_weight} | ({"koleo": self.settings.koleo * warm} if self.settings.koleo else {})
        weights |= {"gram": self.config.gram} if anchored else {}
        losses = {name: output.losses[name] for name in weights}
        self._watch(output, temperature)
        return {"total": sum(weights[name] * loss for name, loss in losses.items()), **losses}

    def _watch(self, output: Output, temperature: float) -> None:
        self.health.add("summary", output.summary)
        self.health.note("teacher_temperature", temperature)
        for name, said in (("dino", output.dino), ("ibot", output.ibot)) if self.health.sampling else ():
            self.health.add_logits(name, said.plain_logits(slice(ROWS)))
        self.health.note("dino/KL", output.dino_divergence)
        self.health.note("ibot/KL", output.ibot_divergence)

    def after_update(self, step: int) -> None:
        momentum = cosine(step, self.total_steps, *self.config.momentum)
        self.model.update(momentum)
        self.health.note("momentum", momentum)
        self.health.note("teacher_distance", lambda: distance(self.model.student, self.model.teacher.net))

    def validate(self) -> dict[str, float]:
        return super().validate() | view_retrieval(self, "global_0", "global_1")

    def transferred(self) -> PrimusBackbone:
        return self.model.teacher.net.backbone  # type: ignore[no-any-return]
