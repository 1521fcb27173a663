"""The one training loop; a method adds its views, its model and its step."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import FolderLock, write_json
from nnssl_ext.core.plan import Plan
from nnssl_ext.core.rng import torch_seed
from nnssl_ext.data.loader import Batch, StepDataset, batches, split_subjects
from nnssl_ext.data.views import ViewSpec
from nnssl_ext.nn import distributed
from nnssl_ext.nn.backbones.base import Backbone, build_backbone, check_support, families
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.checkpoint import adaptation_plan, load_checkpoint, on_cpu, save_checkpoint
from nnssl_ext.trainers.config import SPEED_ONLY, as_plain
from nnssl_ext.trainers.logging import Bar, RunLog
from nnssl_ext.trainers.optim import choose_recipe, learning_rate, make_optimizer, parameter_groups
from nnssl_ext.trainers.pictures import draw_volumes

Losses = dict[str, Tensor]
PICTURES = 20  # pictures of views and predictions over a whole run


class SSLTrainer:
    """Base of every pretraining method.

    A method overrides `Config`, `views`, `build` and `step`, and where it needs to `param_groups`, `after_update`,
    `picture` and `transferred`.

    Args:
        plan: the plan of the dataset.
        configuration: name of one of its configurations.
        config: hyper-parameters.
        store: preprocessed cases of that configuration.
        folder: results folder of the run.
        family: backbone family; None = the method's default.
        device: "cpu" or "cuda".

    Raises:
        UserError: unknown configuration or family, or a backbone that lacks what the method needs.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of every method."""

        epochs: int = 1000  # nnU-Net's length
        iterations: int = 250  # optimiser steps per epoch
        val_iterations: int = 50  # validation batches per epoch, at most
        batch_size: int | None = None  # samples per step and process; None = the plan's
        optimizer: str | None = None  # "sgd", "adamw"; None, here and below = the backbone family's recipe
        lr: float | None = None  # after the warm-up
        weight_decay: float | None = None
        warmup: float | None = None  # share of all steps with linearly rising learning rate
        clip: float | None = None  # largest norm of the gradient
        seed: int = 0
        workers: int | None = field(default=None, metadata=SPEED_ONLY)  # loader processes; None = 1 on the CPU, up to 8 beside a GPU

    default_family: ClassVar[str] = "resenc"
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"pyramid"}),)  # the backbone must support one of these sets
    trains_decoder: ClassVar[bool] = False  # whether the backbone's decoder is worth transferring
    citation: ClassVar[str] = ""
    config: Any  # the method's own Config
    model: Any  # what its `build` returned

    def __init__(
        self, plan: Plan, configuration: str, config: Config, store: CaseStore, folder: Path | str, *, family: str | None = None, device: str = "cpu"
    ) -> None:
        self.plan, self.configuration, self.config, self.store, self.folder = plan, configuration, config, store, Path(folder)
        self.config_plan = plan.configuration(configuration)
        self.family = family or self.default_family
        self.network_plan = self.config_plan.network(self.family)
        check_support(families()[self.family], self.needs, type(self).__name__)
        self.device = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        self.recipe = choose_recipe(self.family, config)
        self.batch_size = config.batch_size or self.network_plan.batch_size
        self.total_steps = config.epochs * config.iterations
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
        """Groups for the optimiser; a group's "lr_scale" multiplies its learning rate."""
        return parameter_groups(model, self.recipe.weight_decay, spare=self.recipe.optimizer == "adamw")

    def after_update(self, step: int) -> None:
        """Called after every optimiser step."""

    def picture(self, batch: Batch) -> list[dict[str, np.ndarray]]:
        """Volumes (z, y, x) by caption for some samples of a batch; empty for no picture."""
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
        self.model = self.build(self.backbone).to(self.device)
        self.parallel: nn.Module = self.model
        if self.ranks > 1:
            self.parallel = DistributedDataParallel(self.model, device_ids=[self.device.index] if self.device.type == "cuda" else None)
        self.optimizer = make_optimizer(self.param_groups(self.model), self.recipe)
        self.next_step = 0
        self.sums: dict[str, float] = {}

    def fit(self, resume: bool = False, stop_at: int | None = None) -> None:
        """Train to the end, or up to (not including) step `stop_at`; checkpoint_latest then continues exactly there.

        Args:
            resume: continue from checkpoint_latest.
            stop_at: optimiser step.

        Raises:
            UserError: the folder is in use or holds another run; loss or gradient is not finite.
        """
        with ExitStack() as stack:
            if self.rank == 0:
                stack.enter_context(FolderLock(self.folder))
            self.initialize()
            if resume:
                self.resume(self.folder / "checkpoint_latest.pth")
            elif (self.folder / "checkpoint_latest.pth").exists():
                raise UserError("the results folder already holds a run", self.folder, "continue it with --c, or move the folder away")
            distributed.barrier()
            if self.next_step < self.total_steps:
                self._loop(stack, min(stop_at or self.total_steps, self.total_steps))

    def _loop(self, stack: ExitStack, stop: int) -> None:
        start, iterations = self.next_step, self.config.iterations
        if self.rank == 0:
            self._describe()
        log = RunLog(self.folder, start // iterations, quiet=self.rank > 0)
        bar = stack.enter_context(Bar(self.total_steps, start, quiet=self.rank > 0))
        loader = batches(self._dataset(self.train_cases, "train"), start, stop, self.workers, pin=self.device.type == "cuda")
        began, waited = time.monotonic(), 0.0
        for step in range(start, stop):
            before = time.monotonic()
            batch = {name: view.to(self.device) for name, view in next(loader).items()}
            waited += time.monotonic() - before
            for name, value in self._update(step, batch).items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.next_step = step + 1
            bar.advance(step + 1, self.sums["total"] / (step % iterations + 1))
            if self.next_step % iterations == 0:
                seconds = time.monotonic() - began
                speed = (step + 1 - max(start, step + 1 - iterations)) * self.batch_size * self.ranks / seconds
                self._end_epoch(batch, log, bar, {"seconds": seconds, "samples_per_second": speed, "data_wait_share": waited / seconds})
                began, waited = time.monotonic(), 0.0
        self.save("latest")
        if self.next_step == self.total_steps:
            self.save("final")

    def _update(self, step: int, batch: Batch) -> dict[str, float]:
        torch.manual_seed(torch_seed(self.config.seed, step * self.ranks + self.rank, "step"))
        rate = learning_rate(step, self.total_steps, self.recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.parallel.train()
        losses = self._losses(batch)
        self.optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        values = {name: float(value.detach()) for name, value in losses.items()}
        if not math.isfinite(values["total"]) or not bool(torch.isfinite(norm)):
            what = f"loss ({values['total']:g}) or gradient norm ({float(norm):g}) is not finite at step {step}"
            raise UserError(what, self.folder, f"lower the learning rate (now {rate:g}) or continue the last good checkpoint with --c")
        self.optimizer.step()
        self.after_update(step)
        return values

    def _losses(self, batch: Batch) -> Losses:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.step(self.parallel, batch)

    def _end_epoch(self, batch: Batch, log: RunLog, bar: Bar, timing: dict[str, float]) -> None:
        epoch = self.next_step // self.config.iterations - 1
        train = {name: distributed.mean(total / self.config.iterations, self.device) for name, total in self.sums.items()}
        val, self.sums = self.validate(), {}
        record: dict[str, Any] = {"epoch": epoch, "step": self.next_step, "lr": self.optimizer.param_groups[0]["lr"]}
        record |= {f"{side}/{name}": value for side, losses in (("train", train), ("val", val)) for name, value in losses.items()}
        log.add(record | {name: round(value, 4) for name, value in timing.items()})
        bar.line(
            f"epoch {epoch + 1}/{self.config.epochs}  train {train['total']:.4f}  val {val.get('total', math.nan):.4f}  "
            f"{timing['samples_per_second']:.1f} samples/s  data wait {timing['data_wait_share']:.0%}",
            self.next_step,
        )
        if self.rank == 0 and (epoch % max(1, self.config.epochs // PICTURES) == 0 or epoch + 1 == self.config.epochs):
            self._draw(epoch, batch)
        score = val.get("total", train["total"])
        if score < self.best:
            self.best = score
            self.save("best")
        self.save("latest")

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean losses over the validation subjects, with views that never change; empty without validation subjects."""
        if not self.val_cases:
            return {}
        count = min(self.config.val_iterations, math.ceil(len(self.val_cases) / (self.batch_size * self.ranks)))
        self.parallel.eval()
        sums: dict[str, float] = {}
        dataset = self._dataset(self.val_cases, "val")
        for step in range(count):
            torch.manual_seed(torch_seed(self.config.seed, step * self.ranks + self.rank, "val"))
            for name, value in self._losses({name: view.to(self.device) for name, view in dataset[step].items()}).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return {name: distributed.mean(value / count, self.device) for name, value in sums.items()}

    def save(self, name: str) -> None:
        """Write checkpoint_NAME.pth (rank 0 only)."""
        if self.rank == 0:
            save_checkpoint(self.folder / f"checkpoint_{name}.pth", self.state())

    def state(self) -> dict[str, Any]:
        """Content of a checkpoint; plain types and tensors, no patient metadata."""
        return {
            "trainer_name": type(self).__name__,
            "family": self.family,
            "configuration": self.configuration,
            "transfer": "encoder+decoder" if self.trains_decoder and "decoder" in self.backbone.supports else "encoder",
            "network_weights": on_cpu(self.transferred().network_weights()),
            "nnssl_adaptation_plan": adaptation_plan(self.backbone, self.config_plan, self.configuration).as_dict(),
            "citations": [{"type": "Pretraining method", "name": type(self).__name__, "apa_citations": [self.citation]}] if self.citation else [],
            "ssl_state": on_cpu(self.model.state_dict()),
            "optimizer_state": on_cpu(self.optimizer.state_dict()),
            "step": self.next_step,
            "sums": dict(self.sums),
            "best": self.best,
            "config": as_plain(self.config),
            "plan": self.plan.as_dict(),
            "versions": {name: importlib.metadata.version(name) for name in ("nnssl_ext", "torch", "timm", "dynamic_network_architectures")},
            "data_hash": self.store.data_hash(),
        }

    def resume(self, path: Path) -> None:
        """Load model, optimiser and position from a checkpoint of this very run.

        Raises:
            UserError: no such checkpoint, or one of another method, configuration or hyper-parameters.
        """
        content = load_checkpoint(path)
        config = as_plain(self.config)
        other = [key for key, value in config.items() if content["config"].get(key) != value and key != "workers"]
        if (content["trainer_name"], content["family"], content["configuration"]) != (type(self).__name__, self.family, self.configuration) or other:
            differs = ", ".join(other) or "trainer, backbone or configuration"
            raise UserError(f"the checkpoint is of another run (differs in: {differs})", path, "repeat the options of that run")
        if content["data_hash"] != self.store.data_hash() and self.rank == 0:
            print("warning: the preprocessed data changed since this checkpoint; the run will differ from an uninterrupted one")
        self.model.load_state_dict(content["ssl_state"])
        self.optimizer.load_state_dict(content["optimizer_state"])
        self.next_step, self.sums, self.best = content["step"], dict(content["sums"]), content["best"]

    def _dataset(self, cases: list[int], stream: str) -> StepDataset:
        return StepDataset(self.store, self.views(), cases, self.config.seed, self.batch_size, rank=self.rank, ranks=self.ranks, stream=stream)

    @torch.no_grad()
    def _draw(self, epoch: int, batch: Batch) -> None:
        self.model.eval()
        if rows := self.picture(batch):
            draw_volumes(rows, self.folder / "pictures" / f"epoch_{epoch + 1:04d}.png", f"{type(self).__name__}, epoch {epoch + 1}")

    def _describe(self) -> None:
        names = {"trainer": type(self).__name__, "family": self.family, "configuration": self.configuration, "dataset": self.plan.dataset_name}
        names |= {"plans": self.plan.plans_name, "data_hash": self.store.data_hash(), "fingerprint_sha256": self.plan.fingerprint_sha256}
        cases = {"train": len(self.train_cases), "validation": len(self.val_cases)}
        settings = {"config": as_plain(self.config), "recipe": dataclasses.asdict(self.recipe), "batch_size": self.batch_size, "processes": self.ranks}
        write_json(self.folder / "run.json", names | settings | {"cases": cases})
