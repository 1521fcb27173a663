"""Small pretraining methods with every kind of state that an engine must carry: momentum teacher, queue, predictor, centre."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from nnssl_ext.data.loader import Batch, batches
from nnssl_ext.data.views import Crop, View, ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.momentum import MomentumTeacher, distance
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.schedules import cosine

WIDTH = 16


@dataclass(frozen=True)
class TwoCrops:
    """Views "a" and "b" of one case; b is a noisy crop from the same place or, half of the time, from another one: hard enough to tempt into a collapse."""

    crop: Crop
    noise: float = 0.3
    elsewhere: float = 0.5

    def sample(self, store, case: int, rng: np.random.Generator) -> dict[str, View]:
        a = self.crop.sample(store, case, rng)["image"]
        b = self.crop.sample(store, case, rng)["image"] if rng.random() < self.elsewhere else a
        return {"a": a, "b": View(b.image + self.noise * rng.standard_normal(b.image.shape, np.float32), b.affine)}


def gathered(x: Tensor) -> Tensor:
    """Rows of all ranks, with gradient."""
    return torch.cat(all_gather(x.contiguous())) if dist.is_initialized() else x


class Standardize(nn.Module):
    """Zero mean and unit variance over the samples of all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        every = gathered(x)
        return (x - every.mean(0)) / (every.var(0, correction=0) + 1e-5).sqrt()


class Encoder(nn.Module):
    """Backbone and projection to (B, WIDTH)."""

    def __init__(self, backbone: Backbone, *last: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(Standardize(), nn.Linear(backbone.widths[-1], 32), nn.ReLU(), nn.Linear(32, width), *last)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone.pooled(x))


class ToyTrainer(SSLTrainer):
    """Two views of a crop, one model that returns named tensors."""

    def views(self) -> ViewSpec:
        return TwoCrops(Crop(self.config_plan.patch_size))

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        return self.losses(*model(batch["a"].image, batch["b"].image))

    def losses(self, *outputs: Tensor) -> Losses:
        raise NotImplementedError

    def after_update(self, step: int) -> None:
        if hasattr(self.model, "teacher"):
            momentum = cosine(step, self.total_steps, 0.9, 0.99)
            self.model.teacher.update(self.model.student, momentum)
            self.health.note("momentum", momentum)
            self.health.note("teacher_distance", lambda: distance(self.model.student, self.model.teacher.net))


class ToyEMATrainer(ToyTrainer):
    """BYOL in small: the student predicts its momentum teacher."""

    def build(self, backbone: Backbone) -> nn.Module:
        return EMAModel(Encoder(backbone))

    def losses(self, prediction: Tensor, target: Tensor) -> Losses:
        self.health.add("projection", target)
        return {"total": 1 - F.cosine_similarity(prediction, target).mean()}


class EMAModel(nn.Module):
    def __init__(self, student: Encoder) -> None:
        super().__init__()
        self.student, self.teacher = student, MomentumTeacher(student)
        self.predictor = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, WIDTH))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.predictor(self.student(a)), self.teacher(b)


class ToyPredictorTrainer(ToyTrainer):
    """SimSiam in small; without predictor and stopped gradient it collapses."""

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        predictor: bool = True

    def build(self, backbone: Backbone) -> nn.Module:
        return PredictorModel(Encoder(backbone), self.config.predictor)

    def losses(self, p: Tensor, target: Tensor, z: Tensor) -> Losses:
        self.health.add("projection", z)
        return {"total": -F.cosine_similarity(p, target).mean()}


class PredictorModel(nn.Module):
    def __init__(self, student: Encoder, predictor: bool) -> None:
        super().__init__()
        self.student, self.on = student, predictor
        self.predictor = nn.Sequential(nn.Linear(WIDTH, 8), Standardize(), nn.ReLU(), nn.Linear(8, WIDTH)) if predictor else nn.Identity()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, target = self.student(a), self.student(b)
        return self.predictor(z), target.detach() if self.on else target, z


class ToyQueueTrainer(ToyTrainer):
    """MoCo in small: negatives come from a queue of keys of all ranks."""

    def build(self, backbone: Backbone) -> nn.Module:
        return QueueModel(Encoder(backbone))

    def losses(self, logits: Tensor, query: Tensor) -> Losses:
        self.health.add("projection", query)
        return {"total": F.cross_entropy(logits / 0.2, torch.zeros(len(logits), dtype=torch.long, device=logits.device))}


class QueueModel(nn.Module):
    queue: Tensor

    def __init__(self, student: Encoder, length: int = 16) -> None:
        super().__init__()
        self.student, self.teacher = student, MomentumTeacher(student)
        self.register_buffer("queue", F.normalize(torch.randn(length, WIDTH), dim=1))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        query, key = F.normalize(self.student(a), dim=1), F.normalize(self.teacher(b), dim=1)
        logits = torch.cat(((query * key).sum(1, keepdim=True), query @ self.queue.clone().to(query.dtype).T), 1)
        if self.training:
            self.queue.copy_(torch.cat((gathered(key).to(self.queue.dtype), self.queue))[: len(self.queue)])
        return logits, query


class ToyCentreTrainer(ToyTrainer):
    """DINO in small: softmax over prototypes, a centred and sharpened teacher; without centring one prototype takes all."""

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        centring: bool = True

    def build(self, backbone: Backbone) -> nn.Module:
        return CentreModel(Encoder(backbone), self.config.centring)

    def losses(self, student: Tensor, teacher: Tensor) -> Losses:
        self.health.add_logits("cls", student, teacher)
        return {"total": -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()}


class CentreModel(nn.Module):
    centre: Tensor

    def __init__(self, student: Encoder, centring: bool) -> None:
        super().__init__()
        self.student, self.teacher, self.centring = student, MomentumTeacher(student), centring
        self.register_buffer("centre", torch.zeros(WIDTH))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = self.student(a), self.teacher(b)
        centred = (teacher - self.centre) / 0.04
        if self.training and self.centring:
            self.centre.lerp_(gathered(teacher).mean(0).to(self.centre.dtype), 0.1)
        return student / 0.1, centred


def trained(run: SSLTrainer, steps: int = 3) -> list[tuple[float, float]]:
    """Losses and gradient norms of some steps."""
    loader = batches(run._dataset(run.train_cases, "train"), 0, steps)
    found = []
    for step in range(steps):
        with run.health.watch(step):
            outcome = run._update(step, loader)
        found.append((outcome.values["total"], outcome.norm))
    return found
