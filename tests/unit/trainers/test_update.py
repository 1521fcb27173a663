"""Clipping part by part against plain loops, and what a step leaves behind."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nnssl_ext.trainers.signals import StopSignals
from nnssl_ext.trainers.update import Updater

CLIP = 0.5


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Linear(4, 6), "head": nn.Linear(6, 3), "small": nn.Linear(6, 2)})


def losses(model, batch):
    hidden = torch.tanh(model["body"](batch))
    return {"total": 30 * model["head"](hidden).square().mean() + 1e-2 * model["small"](hidden).sum()}


def updater(model, groups, accumulate=1, losses=losses):
    config = SimpleNamespace(precision="fp32", accumulate=accumulate)
    return Updater(model, torch.optim.SGD(groups, lr=1.0), losses, torch.device("cpu"), config, clip=CLIP, signals=StopSignals())


def in_parts(model):
    """Two groups of one part, further parts, and a group without any."""
    body = [{"params": [model["body"].weight], "part": "body"}, {"params": [model["body"].bias], "part": "body"}]
    return [*body, {"params": list(model["head"].parameters()), "part": "head"}, {"params": list(model["small"].parameters())}]


def gradients(model, batch):
    """Of every parameter by name, unclipped."""
    reference = copy.deepcopy(model)
    losses(reference, batch)["total"].backward()
    return {name: parameter.grad for name, parameter in reference.named_parameters()}


def moved(model, before):
    """What one step with SGD at rate 1 took away: the clipped gradient."""
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_each_part_is_clipped_by_its_own_norm_and_the_norm_is_that_of_all():
    model, batch = make().double(), torch.randn(5, 4, dtype=torch.float64)
    before, plain = weights(model), gradients(model, batch)
    total = float(losses(model, batch)["total"].detach())
    outcome = updater(model, in_parts(model))([batch], [0])
    clipped = {}
    for part in ("body", "head", "small"):
        values = [float(v) for name, gradient in plain.items() if name.startswith(part) for v in gradient.flatten()]
        norm = math.sqrt(sum(v * v for v in values))
        assert (norm > CLIP) == (part != "small")  # this one stays as it is
        clipped |= {name: gradient * min(1.0, CLIP / (norm + 1e-6)) for name, gradient in plain.items() if name.startswith(part)}
    torch.testing.assert_close(moved(model, before), clipped, rtol=1e-10, atol=1e-12)
    assert outcome.norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in plain.values())), rel=1e-12)
    assert outcome.applied and outcome.values == {"total": total}


def test_without_parts_everything_is_clipped_together_to_the_last_bit():
    model, batch = make(), torch.randn(5, 4)
    reference = copy.deepcopy(model)
    losses(reference, batch)["total"].backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), CLIP)
    torch.optim.SGD(reference.parameters(), lr=1.0).step()
    outcome = updater(model, [{"params": [*model["body"].parameters()]}, {"params": [*model["head"].parameters(), *model["small"].parameters()]}])([batch], [0])
    assert outcome.norm == float(norm)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_a_part_without_gradients_counts_as_zero():
    model, batch = make(), torch.randn(5, 4)
    outcome = updater(model, in_parts(model), losses=lambda net, x: {"total": net["body"](x).sum()})([batch], [0])
    norm = (6 * 5**2 + 6 * float(batch.sum(0).square().sum())) ** 0.5  # six outputs, five samples
    assert outcome.applied and outcome.norm == pytest.approx(norm, rel=1e-6)


def test_one_part_that_is_not_finite_keeps_all_of_them_as_they_were():
    model, batch = make(), torch.randn(5, 4)
    before = weights(model)

    def spoilt(net, x):
        return {"total": losses(net, x)["total"] + (net["small"].bias * float("inf")).sum() * 0.0}

    outcome = updater(model, in_parts(model), losses=spoilt)([batch], [0])
    assert not outcome.applied and all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_values_are_means_over_the_micro_batches():
    model, batches = make(), [torch.randn(5, 4) for _ in range(3)]
    outcome = updater(model, in_parts(model), accumulate=3)(batches, range(3))
    start = make()
    assert outcome.values["total"] == pytest.approx(sum(float(losses(start, batch)["total"].detach()) for batch in batches) / 3, rel=1e-6)
