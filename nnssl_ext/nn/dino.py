"""The model of DINO: a student learns to say of every view what its momentum teacher says of another large one.

Shape suffixes: B volumes, K prototypes, D dimensions of the bottleneck.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nnssl_ext.nn import assign
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.dinov2 import STUDENT_TEMPERATURE, HeadSize, Teaching
from nnssl_ext.nn.heads import ProjectionHead
from nnssl_ext.nn.losses import dino_loss
from nnssl_ext.nn.momentum import MomentumTeacher
from nnssl_ext.nn.projector import Standardize


class PooledNetwork(nn.Module):
    """Backbone, and a projection head on the average of its deepest map; the student, and copied the teacher.

    Averages of a U-Net's maps, which went through InstanceNorm, hardly differ between crops: they are standardised over the crops
    of all processes that are seen together. Otherwise all prototypes soon are equally likely for every crop.
    """

    def __init__(self, backbone: Backbone, size: HeadSize) -> None:
        super().__init__()
        self.backbone = backbone
        self.norm = Standardize() if backbone.instance_norm else nn.Identity()
        self.head = ProjectionHead(backbone.widths[-1], size.hidden, size.bottleneck, size.prototypes)

    def summary(self, crops: Tensor) -> Tensor:
        """Features (n, width) of crops (n, channels, z, y, x)."""
        return self.norm(self.backbone.pooled(crops))  # type: ignore[no-any-return]

    def forward(self, crops: Tensor) -> Tensor:
        """Unit vectors (n, D) of crops (n, channels, z, y, x)."""
        return self.head(self.summary(crops))  # type: ignore[no-any-return]


class DINOModel(nn.Module):
    """Student, teacher and the teacher's centre.

    Args:
        student: the teacher starts as its exact copy, head included.

    Source: Caron et al. 2021, arXiv:2104.14294.
    """

    def __init__(self, student: PooledNetwork) -> None:
        super().__init__()
        self.student, self.teacher = student, MomentumTeacher(student)
        self.centre = assign.Centre(student.head.prototypes.shape[0])

    def forward(self, large: Tensor, small: Tensor | None, temperature: float) -> tuple[Tensor, Tensor, Teaching]:
        """The loss, the student's vectors of the large crops (2B, D), and what the teacher says of them.

        Args:
            large: (2B, channels, z, y, x), all first large crops, then all second ones.
            small: (views * B, channels, z, y, x), view after view; None without any.
            temperature: the teacher's.
        """
        said = self.teach(large, temperature)
        z = self.student(large)
        every = z if small is None else torch.cat((z, self.student(small)))
        loss = dino_loss(every, self.student.head.directions(), said.targets().unflatten(0, (2, -1)), STUDENT_TEMPERATURE)
        return loss, z.detach(), said

    @torch.no_grad()
    def teach(self, large: Tensor, temperature: float) -> Teaching:
        """What the teacher says of the large crops."""
        net: Any = self.teacher.net
        logits = net.head.logits(net.summary(large))
        if self.training:
            self.centre.add(logits)
        return Teaching(logits, temperature, *self.centre.potentials(logits, temperature), balanced=False)

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """After every optimiser step: the teacher follows, the centre moves."""
        self.teacher.update(self.student, momentum)
        self.centre.update()
