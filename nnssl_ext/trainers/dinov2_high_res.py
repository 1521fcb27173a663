"""DINOv2 in 3D, second stage: a trained model goes on with larger crops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nnssl_ext.core.errors import UserError
from nnssl_ext.data.views import ViewSpec
from nnssl_ext.planners.primus import local_crop
from nnssl_ext.trainers.config import AT_LEAST_ONE
from nnssl_ext.trainers.dinov2 import DINOv2Trainer
from nnssl_ext.trainers.dinov2_presets import KOLEO_VOLUMES

SCALE = 1.5  # edge of a global crop over the planned patch
LR_SHARE = 0.1  # of the first stage's learning rate


def large_crop(patch_size: Sequence[int], token: Sequence[int]) -> tuple[int, ...]:
    """Edges of the global crops in voxels: half as many whole tokens again, rounded down."""
    return tuple(int(SCALE * (p // t)) * t for p, t in zip(patch_size, token))


class DINOv2HighResTrainer(DINOv2Trainer):
    """DINOv2 goes on for a tenth of its length with crops of 1.5 times the edge, at a tenth of the learning rate; it needs `-init`.

    The batch shrinks as the tokens of a crop grow in number. The teacher's temperature stays where the first stage ended, the
    prototypes learn from the first step on; all other schedules begin anew and are shorter.

    Source: Oquab et al. 2023, arXiv:2304.07193, section 5 (adapting the resolution).
    """

    @dataclass(frozen=True)
    class Config(DINOv2Trainer.Config):
        epochs: int = field(default=100, metadata=AT_LEAST_ONE)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        config, first, patch = self.config, self.settings, self.config_plan.patch_size
        self.large = large_crop(patch, self.network_plan.kwargs["patch_embed_size"])
        if config.batch_size is None:
            self.batch_size = max(2, round(self.batch_size * math.prod(patch) / math.prod(self.large)))
        volumes = self.batch_size * self.ranks
        self.settings = replace(
            first,
            volumes=volumes,
            temperatures=config.teacher_temperature or (first.temperatures[1],) * 2,
            freeze=config.freeze or 0,
            koleo=first.koleo if volumes >= KOLEO_VOLUMES else 0.0,
            lr=config.lr if config.lr is not None else LR_SHARE * first.lr * math.sqrt(volumes / first.volumes),
        )
        self.recipe = replace(self.recipe, lr=self.settings.lr)

    def views(self) -> ViewSpec:
        spec: Any = super().views()
        return replace(spec, crops=replace(spec.crops, global_size=self.large, local_size=local_crop(self.large, spec.token)))

    def fit(self, resume: bool = False, stop_at: int | None = None) -> None:
        if not resume and not (self.init and self.init.with_heads(type(self))):
            what = f"{type(self).__name__} goes on from a checkpoint of DINOv2Trainer and has no other beginning"
            raise UserError(what, "option -init", "train DINOv2Trainer first, then give its checkpoint_final.pth")
        super().fit(resume, stop_at)
