"""What keeps projections apart is taken away: the alarm says so, whatever their width; it is silent while that works."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import nn

from nnssl_ext.nn.backbones.base import build_backbone
from nnssl_ext.nn.contrastive import nt_xent
from nnssl_ext.nn.cosine import negative_cosine
from nnssl_ext.nn.projector import normalized_mlp
from nnssl_ext.trainers.health import HealthMonitor
from nnssl_ext.trainers.sim_clr import SimCLRTrainer
from nnssl_ext.trainers.sim_siam_iou import SimSiamIoUTrainer
from nnssl_ext.trainers.sinks import read_metrics
from tests.make_data import TINY_SHAPE, ArrayStore, tiny_plan

WINDOW, WINDOWS, BATCH, LATENT = 64, 10, 16, 16  # steps of a check, checks, pairs, numbers of which two views are noisy versions


def aligned(p, z):
    return -F.cosine_similarity(p, z).mean()  # with gradient through both


METHODS = {  # loss of two predictions and two projections, whether there is a predictor
    "SimSiam": (lambda p, z: (negative_cosine(p[0], z[1]) + negative_cosine(p[1], z[0])) / 2, True),
    "SimCLR": (lambda p, z: nt_xent(z[0], z[1], 0.5), False),
    "SimSiam without predictor": (lambda p, z: (negative_cosine(p[0], z[1]) + negative_cosine(p[1], z[0])) / 2, False),
    "SimSiam with gradient": (lambda p, z: (aligned(p[0], z[1]) + aligned(p[1], z[0])) / 2, True),
    "SimCLR without negatives": (lambda p, z: aligned(z[0], z[1]), False),
}
HEALTHY, BROKEN = list(METHODS)[:2], list(METHODS)[2:]


def alarmed(method, width, seed):
    """Number of the check that raises the alarm, counted from 1, or None; and the figures of all checks."""
    torch.manual_seed(seed)
    loss, predicted = METHODS[method]
    mix = torch.randn(LATENT, 32)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), normalized_mlp((32, width, width, width), last=True))
    predictor = normalized_mlp((width, width // 4, width), last=False) if predicted else nn.Identity()
    optimizer = torch.optim.AdamW([*model.parameters(), *predictor.parameters()], 1e-2 if width < 256 else 3e-3)
    monitor = HealthMonitor(build_backbone(tiny_plan().configuration("3d_fullres"), "resenc", 1), WINDOW, armed=WINDOW)
    records = []
    for step in range(WINDOW * WINDOWS):
        content = torch.randn(BATCH, LATENT)
        z = [model((content + torch.randn(BATCH, LATENT)) @ mix) for _ in range(2)]
        p = [predictor(x) for x in z]
        total = loss(p, z)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        with monitor.watch(step):
            monitor.add("projection", z[0])
            monitor.add("prediction", p[0])
        if (step + 1) % WINDOW == 0:
            record, alarms = monitor.epoch(step + 1, 0.0)
            records.append({name.removeprefix("health/"): round(value, 3) for name, value in record.items()})
            if any("collapsed" in text for text in alarms):
                return len(records), records
    return None, records


@pytest.mark.parametrize("method", BROKEN)
def test_projections_that_nothing_keeps_apart_raise_the_alarm(method):
    check, records = alarmed(method, 64, 0)
    assert check is not None, records[-1]


@pytest.mark.parametrize("method", HEALTHY)
def test_projections_that_are_kept_apart_raise_none(method):
    check, records = alarmed(method, 64, 0)
    assert check is None, records[-1]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_so_it_is_for_wide_projections(method):
    check, records = alarmed(method, 512, 1)
    assert (check is None) == (method in HEALTHY), records[-1]


# The methods themselves


class Fields(ArrayStore):
    """Random fields, each as smooth, as bright and as rich in contrast as no other one."""

    def __init__(self, cases: int = 32) -> None:
        super().__init__(cases, TINY_SHAPE)
        for case in range(cases):
            rng = np.random.default_rng(case)
            field = gaussian_filter(rng.standard_normal(TINY_SHAPE), rng.uniform(0.7, 3.0), mode="wrap")
            self.arrays[case] = (field / field.std() * rng.uniform(0.5, 1.5) + 0.5 * rng.standard_normal())[None].astype(np.float32)


class WithoutPredictor(SimSiamIoUTrainer):
    def build(self, backbone):
        model = super().build(backbone)
        model.predictor = nn.Identity()
        return model


class WithGradient(SimSiamIoUTrainer):
    def step(self, model, batch):
        z, p = model(torch.stack((batch["first"].image, batch["second"].image)))
        self.health.add("projection", z.flatten(0, 1))
        self.health.add("prediction", p.flatten(0, 1))
        return {"total": (aligned(p[0], z[1]) + aligned(p[1], z[0])) / 2}


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "broken"), [(SimSiamIoUTrainer, False), (WithoutPredictor, True), (WithGradient, True), (SimCLRTrainer, False)])
def test_a_run_without_what_keeps_features_apart_is_told_and_a_healthy_one_is_not(cls, broken, tmp_path, undrawn):
    sizes = {"hidden": 128} | ({"bottleneck": 32} if issubclass(cls, SimSiamIoUTrainer) else {})
    hot = {"optimizer": "adamw", "lr": 1e-2, "warmup": 0.0}  # collapses in minutes instead of hours
    config = cls.Config(epochs=12, iterations=16, val_iterations=1, batch_size=16, workers=0, **sizes, **hot)
    cls(tiny_plan(), "3d_fullres", config, Fields(), tmp_path, family="primus").fit()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert any("collapsed" in text for record in records for text in record.get("alarms", ())) is broken, records[-1]
