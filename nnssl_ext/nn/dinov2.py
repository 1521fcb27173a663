"""The model of DINOv2-3D: student and teacher on Primus, and what a step computes of them.

Shape suffixes: B volumes, G = 2 B global crops (global_0 of all volumes, then global_1), L local crops (local_0 of all volumes
first), N tokens of a global crop, C width, K prototypes, M hidden tokens of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_ext.data.loader import Batch
from nnssl_ext.nn import assign, health
from nnssl_ext.nn.backbones.primus import PrimusBackbone
from nnssl_ext.nn.class_attention import ClassAttention
from nnssl_ext.nn.gram import GramAnchor
from nnssl_ext.nn.heads import ProjectionHead
from nnssl_ext.nn.losses import dino_loss, ibot_loss, ibot_weights, koleo
from nnssl_ext.nn.momentum import MomentumTeacher

STUDENT_TEMPERATURE = 0.1
CENTRINGS = ("centre", "sinkhorn", "none")
ROWS = 256  # hidden tokens that figures look at, at most


@dataclass(frozen=True)
class HeadSize:
    """Sizes of the two heads: hidden and bottleneck width, prototypes."""

    hidden: int
    bottleneck: int
    prototypes: int


class Network(nn.Module):
    """Backbone, summary of its tokens, heads; the student, and copied the teacher.

    The summary attends to the tokens and not the other way round, so that the exported backbone gives the same tokens.

    Args:
        backbone: with a register token where `class_token` is on.
        heads: attention heads of the summary.
        size: of both heads.
        class_token: the backbone's first register is the summary, as in a classic vision transformer: tokens attend to it.
    """

    def __init__(self, backbone: PrimusBackbone, heads: int, size: HeadSize, class_token: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.mask_token = nn.Parameter(torch.empty(backbone.width).normal_(std=0.02))
        self.summary = None if class_token else ClassAttention(backbone.width, heads)
        self.dino_head = ProjectionHead(backbone.width, size.hidden, size.bottleneck, size.prototypes)
        self.ibot_head = ProjectionHead(backbone.width, size.hidden, size.bottleneck, size.prototypes)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Summaries (n, C) and tokens (n, N, C) of crops (n, channels, z, y, x); `mask` (n, d, h, w), True = hidden."""
        hidden = None if mask is None else mask.flatten(1)
        both = self.backbone.tokens(image, mask=hidden, mask_token=None if mask is None else self.mask_token, registers=True)
        tokens = both[:, self.backbone.registers :]
        return both[:, 0] if self.summary is None else self.summary(tokens), tokens


@dataclass(frozen=True)
class Crops:
    """What the model sees of a batch.

    Args:
        large: global crops, (G, channels, z, y, x).
        mask: bool (G, d, h, w), True = hidden from the student.
        hidden: (M,) ascending flat indices of the hidden tokens in (G * N).
        small: local crops, (L, channels, z, y, x); None without any.
    """

    large: Tensor
    mask: Tensor
    hidden: Tensor
    small: Tensor | None = None

    @staticmethod
    def of(batch: Batch) -> Crops:
        """The views of a `MaskedMultiCrop`."""
        first, second = batch["global_0"], batch["global_1"]
        small = [view.image for name, view in batch.items() if name.startswith("local_")]
        assert first.mask is not None and second.mask is not None and first.hidden is not None and second.hidden is not None
        hidden = torch.cat((first.hidden, second.hidden + first.mask.numel()))
        return Crops(torch.cat((first.image, second.image)), torch.cat((first.mask, second.mask)), hidden, torch.cat(small) if small else None)


@dataclass(frozen=True)
class Teaching:
    """What a teacher's head says: targets are exp(logits / temperature + row + column).

    Args:
        logits: (n, K) in the type of autocast, neither centred nor divided by the temperature.
        row, column: potentials (n,), (K,), see `assign`.
        balanced: whether they were chosen so that all prototypes are used.
    """

    logits: Tensor
    temperature: float
    row: Tensor
    column: Tensor
    balanced: bool

    def targets(self, rows: slice = slice(None)) -> Tensor:
        """Probabilities of some rows, (rows, K)."""
        return assign.probabilities(self.logits[rows], self.temperature, self.row[rows], self.column)

    def plain_logits(self, rows: slice) -> Tensor:
        """Logits over the temperature of some rows, centred at most, never balanced: a balanced assignment would hide a collapse."""
        offset = -self.logits.float().mean(0) / self.temperature if self.balanced else self.column
        return self.logits[rows] / self.temperature + offset


@dataclass(frozen=True)
class Output:
    """Losses (scalars, unweighted), and detached tensors for figures.

    Args:
        losses: "dino", "ibot", "koleo", "gram".
        summary: of the student, before the head, of the global crops, (G, C).
        dino, ibot: what the teacher's heads say; of the global crops (G, K) and of the hidden tokens (M, K).
        guesses: the student's bottleneck vectors of the hidden tokens (M, D) and the prototypes (K, D).
    """

    losses: dict[str, Tensor]
    summary: Tensor
    dino: Teaching
    ibot: Teaching
    guesses: tuple[Tensor, Tensor]

    def dino_divergence(self) -> Tensor:
        """KL(teacher || student) in nat, mean over the pairs of views: the loss without the teacher's entropy."""
        return self.losses["dino"].detach() - torch.special.entr(self.dino.targets()).sum(1).mean()

    def ibot_divergence(self) -> Tensor:
        """KL(teacher || student) in nat, mean over the first hidden tokens."""
        z, directions = self.guesses
        return health.divergence(self.ibot.targets(slice(ROWS)).log(), z[:ROWS] @ directions.T / STUDENT_TEMPERATURE)


class DINOv2Model(nn.Module):
    """Student, teacher and the teacher's centre.

    Args:
        student: the teacher starts as its exact copy, heads included.
        centring: of the summaries' targets: "centre", "sinkhorn", or "none" (which collapses; then the tokens' targets aren't balanced either).
        unmasked: whether the summaries come from a pass of their own over whole crops.
        anchored: whether there is an anchor for the student's tokens (`gram`).
    """

    def __init__(self, student: Network, centring: str, unmasked: bool = False, anchored: bool = False) -> None:
        super().__init__()
        self.student, self.teacher = student, MomentumTeacher(student)
        self.anchor = GramAnchor(student.backbone) if anchored else None
        self.centring, self.unmasked = centring, unmasked
        self.centre = assign.Centre(student.dino_head.prototypes.shape[0])

    def forward(self, crops: Crops, temperature: float, hidden_share: float | None = None) -> Output:
        """All losses of a batch.

        Args:
            temperature: the teacher's.
            hidden_share: of a crop's tokens, at most; with it "gram" is among the losses.
        """
        dino, ibot = self.teach(crops, temperature)
        summary, tokens = self.student(crops.large, crops.mask)
        if self.unmasked:
            summary, _ = self.student(crops.large)
        summaries = summary if crops.small is None else torch.cat((summary, self.student(crops.small)[0]))
        head = self.student.ibot_head
        z, directions = head(tokens.flatten(0, 1)[crops.hidden]), head.directions()
        weights = ibot_weights(crops.mask.flatten(1), crops.hidden)
        said = self.student.dino_head(summaries), self.student.dino_head.directions()
        losses = {
            "dino": dino_loss(*said, dino.targets().unflatten(0, (2, -1)), STUDENT_TEMPERATURE),
            "ibot": ibot_loss(z, directions, assign.targets(ibot.logits, temperature, ibot.row, ibot.column), weights, STUDENT_TEMPERATURE),
            "koleo": koleo(summary[: len(summary) // 2]) + koleo(summary[len(summary) // 2 :]),
        }
        if self.anchor is not None and hidden_share is not None:
            losses["gram"] = self.anchor.loss(tokens, crops.large, crops.mask, hidden_share)
        return Output(losses, summary.detach(), dino, ibot, (z.detach(), directions.detach()))

    @torch.no_grad()
    def teach(self, crops: Crops, temperature: float) -> tuple[Teaching, Teaching]:
        """What the teacher says of summaries and of hidden tokens."""
        net: Any = self.teacher.net
        summary, tokens = self.teacher(crops.large)
        seen, told = net.dino_head.logits(summary), net.ibot_head.logits(tokens.flatten(0, 1)[crops.hidden])
        if self.centring == "centre" and self.training:
            self.centre.add(seen)
        of_summaries = {"centre": self.centre.potentials, "sinkhorn": assign.sinkhorn, "none": assign.softmax}[self.centring]
        of_tokens = assign.softmax if self.centring == "none" else assign.sinkhorn
        dino = Teaching(seen, temperature, *of_summaries(seen, temperature), self.centring == "sinkhorn")
        return dino, Teaching(told, temperature, *of_tokens(told, temperature), self.centring != "none")

    def take_anchor(self) -> None:
        """The teacher's backbone as it is now becomes the anchor."""
        teacher: Any = self.teacher.net
        if self.anchor is not None:
            self.anchor.update(teacher.backbone, 0.0)

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """After every optimiser step: the teacher follows, the centre moves."""
        self.teacher.update(self.student, momentum)
        if self.centring == "centre":
            self.centre.update()
