"""The one training loop; a method adds its views, its model and its step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nnssl_ext.core.files import FolderLock
from nnssl_ext.core.plan import Plan
from nnssl_ext.core.rng import torch_seed
from nnssl_ext.data.loader import Batch, StepDataset, batches, deaths_explained, split_subjects
from nnssl_ext.data.switches import check_names, without
from nnssl_ext.data.views import ViewSpec
from nnssl_ext.nn import distributed, parallel
from nnssl_ext.nn.backbones.base import Backbone, backbone_class, build_backbone, check_support
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.checkpoint import save_checkpoint
from nnssl_ext.trainers.config import AT_LEAST_ONE, SHARE, SPEED_ONLY
from nnssl_ext.trainers.description import describe
from nnssl_ext.trainers.guards import NonFiniteGuard
from nnssl_ext.trainers.health import HealthMonitor
from nnssl_ext.trainers.initial import Initial
from nnssl_ext.trainers.optim import RECIPES, Recipe, choose_recipe, make_optimizer, parameter_groups, set_rates
from nnssl_ext.trainers.pictures import Rows, draw_run, evaluating
from nnssl_ext.trainers.resumption import begin, content_of, restore
from nnssl_ext.trainers.run_log import RunLog, milestones
from nnssl_ext.trainers.schedules import polynomial
from nnssl_ext.trainers.signals import Stopped, StopSignals
from nnssl_ext.trainers.update import Outcome, Updater

Losses = dict[str, Tensor]


class SSLTrainer:
    """Base of every pretraining method.

    A method overrides `Config`, `views`, `build` and `step`, and where it needs to `recipes`, `param_groups`,
    `schedule`, `after_update`, `picture` and `transferred`.

    Args:
        plan: the plan of the dataset.
        configuration: name of one of its configurations.
        config: hyper-parameters.
        store: preprocessed cases of that configuration.
        folder: results folder of the run.
        family: backbone family; None = the method's default.
        device: "cpu" or "cuda".

    Raises:
        UserError: unknown configuration, family or augmentation, or a backbone that lacks what the method needs.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of every method."""

        epochs: int = field(default=1000, metadata=AT_LEAST_ONE)  # nnU-Net's length
        iterations: int = field(default=250, metadata=AT_LEAST_ONE)  # optimiser steps per epoch
        val_iterations: int = 50  # validation batches per epoch, at most
        batch_size: int | None = field(default=None, metadata=AT_LEAST_ONE)  # samples per step and process; None = the plan's
        optimizer: str | None = None  # "sgd", "adamw"; None, here and below = the backbone family's recipe
        lr: float | None = None  # after the warm-up
        weight_decay: float | None = None
        warmup: float | None = field(default=None, metadata=SHARE)  # share of all steps with linearly rising learning rate
        clip: float | None = None  # largest norm of the gradient
        accumulate: int = field(default=1, metadata=AT_LEAST_ONE)  # batches per optimiser step
        precision: str = "auto"  # of the forward pass: "fp32", "bf16", "fp16"; "auto" = bf16 on CUDA, fp32 on the CPU
        max_skips: int = 20  # optimiser steps in a row that may be skipped because something is not finite
        seed: int = 0
        no_augment: tuple[str, ...] = ()  # augmentations of the views that are left out, such as blur,gamma
        workers: int | None = field(default=None, metadata=SPEED_ONLY)  # loader processes; None = 1 on the CPU, up to 8 beside a GPU
        recompute: bool = field(default=False, metadata=SPEED_ONLY)  # activations in the backward pass: less memory, slower
        compile: bool = field(default=False, metadata=SPEED_ONLY)  # blocks and stages with torch.compile
        sharding: str = field(default="ddp", metadata=SPEED_ONLY)  # of several processes: "ddp": a copy of the model each; "fsdp": a share each

    default_family: ClassVar[str] = "resenc"
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"pyramid"}),)  # the backbone must support one of these sets
    trains_decoder: ClassVar[bool] = False  # whether the backbone's decoder is trained
    transfers_decoder: ClassVar[bool] = True  # whether a trained decoder is transferred with the encoder
    recipes: ClassVar[dict[str, Recipe]] = RECIPES  # by backbone family
    citation: ClassVar[str] = ""
    probe: Callable[[Backbone, torch.device], dict[str, float]] | None = None  # quality of frozen features, named figures
    settings: Any = None  # what the method derived for this run beside its Config, a dataclass
    init: Initial | None = None  # the earlier checkpoint whose weights it starts from
    config: Any  # the method's own Config
    model: Any  # what its `build` returned

    def __init__(
        self, plan: Plan, configuration: str, config: Config, store: CaseStore, folder: Path | str, *, family: str | None = None, device: str = "cpu"
    ) -> None:
        self.plan, self.configuration, self.config, self.store, self.folder = plan, configuration, config, store, Path(folder)
        self.config_plan = plan.configuration(configuration)
        self.family = family or self.default_family
        self.network_plan = self.config_plan.network(self.family)
        check_support(backbone_class(self.config_plan, self.family), self.needs, type(self).__name__)
        check_names(config.no_augment)
        self.device = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        self.recipe = choose_recipe(self.recipes, self.family, config)
        self.batch_size = config.batch_size or self.network_plan.batch_size
        self.total_steps = config.epochs * config.iterations
        self.warmup_steps = round(self.recipe.warmup * self.total_steps)
        self.rank, self.ranks = distributed.rank(), distributed.ranks()
        self.best = math.inf
        self.workers = config.workers if config.workers is not None else 1 if device == "cpu" else min(8, os.cpu_count() or 1)

    def views(self) -> ViewSpec:
        """What the loader prepares for each sample."""
        raise NotImplementedError

    def build(self, backbone: Backbone) -> nn.Module:
        """The whole model around the backbone."""
        raise NotImplementedError

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        """Named scalars of one batch; "total" is optimised."""
        raise NotImplementedError

    def param_groups(self, model: nn.Module) -> list[dict]:
        """Groups for the optimiser; "lr_scale" and "wd_scale" multiply a group's rates (`set_rates`), each "part" (a name) is clipped by itself."""
        return parameter_groups(model, self.recipe.weight_decay, spare=self.recipe.optimizer == "adamw")

    def schedule(self, step: int) -> None:
        """Set the learning rate of every parameter group, and the weight decay where it moves, before optimiser step `step`."""
        set_rates(self.optimizer, polynomial(step, self.total_steps, self.recipe.lr, self.warmup_steps))

    def after_update(self, step: int) -> None:
        """Called after every optimiser step."""

    def picture(self, batch: Batch) -> Rows:
        """What is shown of some samples of a batch, by caption (`draw_volumes`); empty for no picture."""
        return []

    def transferred(self) -> Backbone:
        """The backbone whose weights a checkpoint hands over (self-distillation: the teacher's)."""
        return self.backbone

    def initialize(self) -> None:
        """Build data, model and optimiser; deterministic for a seed."""
        subjects = [self.store.subject(i) for i in range(len(self.store))]
        self.train_cases, self.val_cases = split_subjects(subjects, self.config.seed)
        torch.manual_seed(torch_seed(self.config.seed, 0, "init"))
        self.backbone = build_backbone(self.config_plan, self.family, self.plan.channels)
        self.backbone.train_decoder(self.trains_decoder)
        self.model = self.build(self.backbone).to(self.device)
        parallel.speed_up(self.model, self.device, compiled=self.config.compile, recomputed=self.config.recompute)
        self.parallel = parallel.spread(self.model, self.config.sharding, self.device)
        self.optimizer = make_optimizer(self.param_groups(self.model), self.recipe)
        self.signals = StopSignals()
        self.update = Updater(self.parallel, self.optimizer, self.step, self.device, self.config, clip=self.recipe.clip, signals=self.signals)
        armed = max(self.warmup_steps, self.config.iterations)
        self.health = HealthMonitor(self.backbone, self.config.iterations, armed=armed, active=self.rank == 0)
        self.guard = NonFiniteGuard(self.folder if self.rank == 0 else None, self.config.max_skips)
        self.val_data = self._dataset(self.val_cases, "val")
        self.next_step = 0
        self.sums: dict[str, float] = {}

    def fit(self, resume: bool = False, stop_at: int | None = None) -> None:
        """Train to the end, or up to (not including) step `stop_at`; checkpoint_latest then continues exactly there.

        Args:
            resume: continue from checkpoint_latest.
            stop_at: optimiser step.

        Raises:
            UserError: the folder is in use or holds another run; too many steps were not finite; a loader process died.
            Stopped: by SIGTERM, SIGUSR1 or SIGUSR2; checkpoint_latest holds the last step.
        """
        with ExitStack() as stack:
            if self.rank == 0:
                stack.enter_context(FolderLock(self.folder))
            self.initialize()
            begin(self, resume)
            distributed.barrier()
            if self.next_step < self.total_steps:
                self._loop(stack, min(stop_at or self.total_steps, self.total_steps))

    def _loop(self, stack: ExitStack, stop: int) -> None:
        start, iterations, accumulate = self.next_step, self.config.iterations, self.config.accumulate
        log = stack.enter_context(RunLog(self.folder, describe(self), start, quiet=self.rank > 0))
        stack.enter_context(self.signals)
        stack.enter_context(deaths_explained())
        loader = batches(self._dataset(self.train_cases, "train"), start * accumulate, stop * accumulate, self.workers, pin=self.device.type == "cuda")
        began, self.waited = time.monotonic(), 0.0
        for step in range(start, stop):
            with self.health.watch(step):
                outcome = self._update(step, loader)
            self.health.seen(step, outcome.values["total"], outcome.norm, outcome.applied, self.batch)
            self.guard.seen(step, outcome, self.state, log.say)
            self.next_step = step + 1
            if outcome.applied:
                for name, value in {**outcome.values, "steps": 1.0}.items():
                    self.sums[name] = self.sums.get(name, 0.0) + value
                log.advance(step + 1, self.sums["total"] / self.sums["steps"])
            if self.next_step % iterations == 0:
                seconds = time.monotonic() - began
                speed = (step + 1 - max(start, step + 1 - iterations)) * self.batch_size * accumulate * self.ranks / seconds
                self._end_epoch(log, {"seconds": seconds, "samples_per_second": speed, "data_wait_share": self.waited / seconds})
                began, self.waited = time.monotonic(), 0.0
            elif outcome.signal or self.next_step == stop:
                self.save("latest")
            if outcome.signal:
                distributed.barrier()  # who watches the processes may end all of them when the first one has ended
                raise Stopped(outcome.signal)
        if self.next_step == self.total_steps:
            self.save("final")

    def _update(self, step: int, loader: Iterator[Batch]) -> Outcome:
        self.schedule(step)
        self.parallel.train()
        numbers = range(step * self.config.accumulate, (step + 1) * self.config.accumulate)
        seeds = (torch_seed(self.config.seed, number * self.ranks + self.rank, "step") for number in numbers)
        outcome = self.update((self._next(loader) for _ in numbers), seeds)
        if outcome.applied:
            self.after_update(step)
        return outcome

    def _next(self, loader: Iterator[Batch]) -> Batch:
        before = time.monotonic()
        self.batch = {name: view.to(self.device) for name, view in next(loader).items()}
        self.waited += time.monotonic() - before
        return self.batch

    def _end_epoch(self, log: RunLog, timing: dict[str, float]) -> None:
        epoch = self.next_step // self.config.iterations - 1
        steps = self.sums.pop("steps", 0.0)
        train = {name: distributed.mean(total / steps, self.device) for name, total in self.sums.items()} or {"total": math.nan}
        val, self.sums = self.validate(), {}
        record: dict[str, Any] = {"epoch": epoch, "step": self.next_step, "lr": max(group["lr"] for group in self.optimizer.param_groups)}
        record |= {f"{side}/{name}": value for side, losses in (("train", train), ("val", val)) for name, value in losses.items()}
        figures, alarms = self.health.epoch(self.next_step, timing["data_wait_share"])
        for text in alarms:
            log.alarm(text)
        with parallel.together(self.model):
            record |= figures | log.measure("probe", lambda: self._probed(epoch))
            log.epoch(record | {name: round(value, 4) for name, value in timing.items()})
            log.draw(epoch, lambda path: draw_run(self, self.batch, path))
        score = val.get("total", train["total"])
        collapsed = distributed.largest([float(self.health.collapsed)], self.device)[0]  # only rank 0 knows
        if score < self.best and not collapsed:
            self.best = score
            self.save("best")
        self.save("latest")

    def _probed(self, epoch: int) -> dict[str, float]:
        if self.probe is None or self.rank or epoch not in milestones(self.config.epochs):
            return {}
        backbone = self.transferred()
        with torch.random.fork_rng(), evaluating(self.model, backbone):
            return {f"probe/{name}": value for name, value in self.probe(backbone, self.device).items()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean losses over the validation subjects, with views that never change; empty without validation subjects."""
        if not self.val_cases:
            return {}
        count = min(self.config.val_iterations, math.ceil(len(self.val_cases) / (self.batch_size * self.ranks)))
        self.parallel.eval()
        sums: dict[str, float] = {}
        for step in range(count):
            torch.manual_seed(torch_seed(self.config.seed, step * self.ranks + self.rank, "val"))
            with self.update.autocast():
                losses = self.step(self.parallel, {name: view.to(self.device) for name, view in self.val_data[step].items()})
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return {name: distributed.mean(value / count, self.device) for name, value in sums.items()}

    def save(self, name: str) -> None:
        """Write checkpoint_NAME.pth (on rank 0; the others only help to put a sharded model together)."""
        if self.rank and not parallel.is_sharded(self.model):
            return
        content, previous = self.state(), self.folder / "checkpoint_previous.pth" if name == "latest" else None
        if self.rank == 0:
            save_checkpoint(self.folder / f"checkpoint_{name}.pth", content, previous)

    def state(self) -> dict[str, Any]:
        """Content of a checkpoint; plain types and tensors, no patient metadata."""
        return content_of(self)

    def load(self, content: dict[str, Any], path: Path) -> None:
        """Take model, optimiser and position from the content of a checkpoint of this very run.

        Raises:
            UserError: it is one of another method, configuration or hyper-parameters.
        """
        restore(self, content, path)

    def _dataset(self, cases: list[int], stream: str) -> StepDataset:
        spec, seed, size, on_device = without(self.views(), self.config.no_augment), self.config.seed, self.batch_size, self.device.type == "cuda"
        return StepDataset(self.store, spec, cases, seed, size, rank=self.rank, ranks=self.ranks, stream=stream, on_device=on_device)
