"""Optimisers without the compiler: the same numbers as PyTorch's."""

import copy

import pytest
import torch
from torch import nn

from nnssl_ext.nn import optimizers

KINDS = {"SGD": {"momentum": 0.99, "nesterov": True}, "AdamW": {"betas": (0.9, 0.98), "fused": True}}


def train(cls, options, model, steps, state=None):
    groups = [{"params": [model[0].weight], "weight_decay": 0.1}, {"params": [model[0].bias], "weight_decay": 0.0}]
    optimizer = cls(groups, lr=0.05, **options)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        model(torch.full((2, 3), float(step + 1))).square().sum().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_state_are_those_of_pytorch(kind):
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Linear(3, 4))
    theirs = copy.deepcopy(mine)
    own, reference = (train(cls, KINDS[kind], model, 5) for cls, model in ((getattr(optimizers, kind), mine), (getattr(torch.optim, kind), theirs)))
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters()))
    own, reference = own.state_dict(), reference.state_dict()
    assert own["param_groups"] == reference["param_groups"]
    assert all(torch.equal(own["state"][n][key], value) for n, values in reference["state"].items() for key, value in values.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_pytorchs_optimiser_is_continued(kind):
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Linear(3, 4))
    state = train(getattr(torch.optim, kind), KINDS[kind], mine, 3).state_dict()
    theirs = copy.deepcopy(mine)
    train(getattr(optimizers, kind), KINDS[kind], mine, 2, copy.deepcopy(state))
    train(getattr(torch.optim, kind), KINDS[kind], theirs, 2, copy.deepcopy(state))
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_builds_no_graph_and_needs_a_gradient_only_where_there_is_one(kind):
    model = nn.Sequential(nn.Linear(3, 4))
    optimizer = getattr(optimizers, kind)(model.parameters(), lr=0.1)
    model[0].weight.square().sum().backward()  # none for the bias
    before = model[0].bias.clone()
    optimizer.step()
    assert model[0].weight.grad_fn is None and model[0].weight.requires_grad and torch.equal(model[0].bias, before)
