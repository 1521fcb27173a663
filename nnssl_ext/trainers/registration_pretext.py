"""Registration as pretext: find the deformation between two subjects, and one that is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_ext.data.augment import DINO
from nnssl_ext.data.loader import Batch
from nnssl_ext.data.partners import training_partners
from nnssl_ext.data.random_warp import RegistrationPair
from nnssl_ext.data.views import Crop, ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.registration_head import RegistrationNet
from nnssl_ext.nn.registration_losses import end_point_error, flow_gradient, squared_lncc
from nnssl_ext.nn.warp import jacobian_determinant, warp
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.colours import displacement_rgb
from nnssl_ext.trainers.config import SHARE
from nnssl_ext.trainers.pictures import volume_rows


class RegistrationPretextTrainer(SSLTrainer):
    """Finds the stationary velocity whose exponential warps one crop onto another one, by the features of a shared encoder.

    Pairs are crops of two subjects, or a crop and what is seen of it through a random diffeomorphism. The loss is 1 - squared
    local correlation of the warped crop and the fixed one, plus the mean squared gradient of the velocity, plus, where the
    displacement is known, the end-point error in voxels (0 for other pairs; the mean is over all of them).

    Source: Balakrishnan et al. 2019, arXiv:1809.05231 (unsupervised loss); Dalca et al. 2019, arXiv:1903.03545 (stationary
    velocities); Sun et al. 2018, arXiv:1709.02371 (warping and correlation, coarse to fine).
    """

    needs = (frozenset({"pyramid", "volume"}),)
    citation = (
        "Dalca, A. V., Balakrishnan, G., Guttag, J., & Sabuncu, M. R. (2019). Unsupervised learning of probabilistic diffeomorphic registration for "
        "images and surfaces. Medical Image Analysis, 57, 226-236."
    )

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        known: float = field(default=0.5, metadata=SHARE)  # of the pairs; all of them in a dataset of one subject
        largest: float = field(default=0.125, metadata={"range": (0, 0.2)})  # displacement of a known pair along each axis, in edges of the crop
        similarity: float = 1.0  # weight of 1 - squared correlation
        smoothness: float = 1.0  # weight of the velocity's gradient
        end_point: float = 1.0  # weight of the end-point error

    @dataclass(frozen=True)
    class Settings:
        known: float  # share of the pairs whose displacement is known

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.subjects = len({self.store.subject(case) for case in range(len(self.store))})
        self.settings = self.Settings(self.config.known if self.subjects > 1 else 1.0)

    def initialize(self) -> None:
        super().initialize()
        if self.rank == 0 and self.settings.known != self.config.known:
            print("all cases are of one subject: every pair is a crop and a known warp of it")

    def views(self) -> ViewSpec:
        partners = training_partners(self.store, self.config.seed, type(self).__name__, self.plan.dataset_name) if self.subjects > 1 else None
        return RegistrationPair(Crop(self.config_plan.patch_size, intensity=DINO), partners, self.settings.known, self.config.largest)

    def build(self, backbone: Backbone) -> nn.Module:
        return RegistrationNet(backbone)

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        fixed, moving, config = batch["fixed"].image, batch["moving"].image, self.config
        velocity, displacement = model(fixed, moving)
        similarity = 1 - squared_lncc(warp(moving, displacement), fixed)
        smoothness = flow_gradient(velocity)
        errors = end_point_error(displacement, batch["displacement"].image)
        end_point = torch.where(known(batch).to(errors.device), errors, 0).mean()
        total = config.similarity * similarity + config.smoothness * smoothness + config.end_point * end_point
        return {"total": total, "similarity": similarity, "smoothness": smoothness, "end_point": end_point}

    def picture(self, batch: Batch) -> list[dict[str, np.ndarray]]:
        fixed, moving, true = (batch[name].image[:2] for name in ("fixed", "moving", "displacement"))
        displacement = self.model(fixed, moving)[1]
        rows = volume_rows({"fixed": fixed, "moving": moving, "warped": warp(moving, displacement)})
        colours = displacement_rgb(torch.stack((displacement, true.to(displacement.dtype)), 1).flatten(0, 1))
        volumes = jacobian_determinant(displacement)[..., None].expand(-1, -1, -1, -1, 3).float().cpu().numpy()
        for i, row in enumerate(rows):
            row |= {"displacement": colours[2 * i], "known (grey: none)": colours[2 * i + 1], "Jacobian (grey: 1)": volumes[i] / 2}
        return rows


def known(batch: Batch) -> Tensor:
    """Which pairs are of one case, so that their displacement is known, (B,) bool on the CPU."""
    return torch.tensor([a == b for a, b in zip(batch["fixed"].cases, batch["moving"].cases)])
