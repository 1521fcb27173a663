"""VoCo: where a crop lies, told by its likeness to the crops of a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.plan import Plan
from nnssl_ext.data.augment import NNUNET
from nnssl_ext.data.grid import GridTargets, assembled, overlaps
from nnssl_ext.data.loader import Batch
from nnssl_ext.data.views import ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.momentum import distance
from nnssl_ext.nn.voco import CropProjector, VoCoModel, crowding, likeness, next_volume, position_loss
from nnssl_ext.planners.primus import local_crop
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.config import AT_LEAST_ONE, SHARE, check_several
from nnssl_ext.trainers.optim import RECIPES, Recipe
from nnssl_ext.trainers.pictures import blend

COLOUR = (1.0, 0.6, 0.0)  # of a cell of the grid in the picture, times its likeness


class VoCoTrainer(SSLTrainer):
    """Volume contrast: base crops tile a part of the case, and the cosine of a random crop with each of them has to be their overlap.

    L = intra + inter + crowding: the overlap with the volume's own grid; what a momentum teacher says of the likeness to the
    grid of another volume; and base crops have to be unlike each other.

    Source: Wu et al. 2024, arXiv:2402.17300; Wu et al. 2024, arXiv:2410.09890 (inter).
    """

    needs = (frozenset({"pyramid", "any_size"}), frozenset({"pyramid", "decoder"}))
    recipes: ClassVar[dict[str, Recipe]] = dict.fromkeys(RECIPES, Recipe("adamw", 1e-4, 0.01, 0.02, 1.0, (0.9, 0.999)))
    citation = "Wu, L., Zhuang, J., & Chen, H. (2024). VoCo: A simple-yet-effective volume contrastive learning framework for 3D medical image analysis. CVPR."

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        grid: tuple[int, ...] = field(default=(1, 3, 3), metadata=AT_LEAST_ONE)  # base crops along (z, y, x); the authors' code
        targets: int = field(default=2, metadata=AT_LEAST_ONE)  # random crops of a volume; the authors' code
        hidden: int = field(default=1024, metadata=AT_LEAST_ONE)  # width of the projector; the authors' code
        momentum: float = field(default=0.9, metadata=SHARE)  # of the teacher; the authors' code

    def __init__(
        self, plan: Plan, configuration: str, config: Config, store: CaseStore, folder: Path | str, *, family: str | None = None, device: str = "cpu"
    ) -> None:
        super().__init__(plan, configuration, config, store, folder, family=family, device=device)
        if len(config.grid) != 3 or math.prod(config.grid) < 2:
            raise UserError(f"a grid of {config.grid} has no two neighbours along three axes", "option -o grid", "give three numbers, such as -o grid=1,3,3")
        patch = self.config_plan.patch_size
        self.crop = local_crop(patch, self.config_plan.in_volume(self.network_plan.cell))
        if config.batch_size is None:
            crops = math.prod(config.grid) + config.targets
            self.batch_size = max(2, self.batch_size * math.prod(patch) // (crops * math.prod(self.crop)))
        check_several(self.batch_size * self.ranks, type(self).__name__)

    def views(self) -> ViewSpec:
        return GridTargets(self.config.grid, self.crop, self.config.targets, intensity=NNUNET)

    def build(self, backbone: Backbone) -> nn.Module:
        return VoCoModel(CropProjector(backbone, self.config.hidden))

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        student, teacher = model(torch.stack([view.image for view in batch.values()]))
        self.health.add("projection", student.flatten(0, 1))
        (bases, targets), (taught, heard) = (x.split([x.shape[1] - self.config.targets, self.config.targets], 1) for x in (student, teacher))
        other = next_volume(taught)
        losses = {
            "intra": position_loss(likeness(targets, taught), self.labels(batch).to(targets.device)),
            "inter": position_loss(likeness(targets, other), likeness(heard, other)),
            "crowding": crowding(bases),
        }
        return {"total": torch.stack(list(losses.values())).sum(), **losses}

    def labels(self, batch: Batch) -> Tensor:
        """Share of every target that every base crop covers, (B, targets, bases)."""
        affines = {kind: torch.stack([view.affine for name, view in batch.items() if name.startswith(kind)], 1) for kind in ("target", "base")}
        return overlaps(affines["target"], affines["base"], self.crop)

    def after_update(self, step: int) -> None:
        self.model.teacher.update(self.model.student, self.config.momentum)
        self.health.note("teacher_distance", lambda: distance(self.model.student, self.model.teacher.net))

    def picture(self, batch: Batch) -> list[dict[str, np.ndarray]]:
        count, true = math.prod(self.config.grid), self.labels(batch)
        student, teacher = self.model(torch.stack([view.image for view in batch.values()]))
        told = likeness(student[:, count:], teacher[:, :count])
        rows = []
        for sample in range(min(2, len(true))):
            images = torch.stack([view.image[sample, 0] for view in batch.values()]).float().cpu()
            grid = assembled(images[:count], batch["base_0"].affine[sample], self.config.grid).numpy()
            cells = {f"{name} (target 0)": x[sample, 0].float().cpu().numpy() for name, x in (("overlap", true), ("likeness", told))}
            coloured = {name: blend(grid, x.reshape(*self.config.grid, 1) * COLOUR) for name, x in cells.items()}
            rows.append({"grid": grid, "target 0": images[count].numpy(), **coloured})
        return rows
