"""Recipes, groups and their rates."""

import pytest
import torch
from torch import nn

from nnssl_ext.core.errors import UserError
from nnssl_ext.trainers.base import SSLTrainer
from nnssl_ext.trainers.optim import RECIPES, Recipe, choose_recipe, make_optimizer, parameter_groups


def test_every_parameter_is_in_exactly_one_group_and_vectors_are_spared_of_decay():
    model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.InstanceNorm3d(4, affine=True), nn.Linear(4, 4))
    model.register_parameter("pos_embed", nn.Parameter(torch.zeros(1, 5, 4)))
    model.register_parameter("frozen", nn.Parameter(torch.zeros(3), requires_grad=False))
    groups = parameter_groups(model, 0.05, spare=True)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [sorted(names[id(p)] for p in g["params"]) for g in groups] == [["0.weight", "2.weight"], ["0.bias", "1.bias", "1.weight", "2.bias", "pos_embed"]]
    assert [g["weight_decay"] for g in groups] == [0.05, 0.0]
    assert len(parameter_groups(model, 0.05, spare=False)) == 1


def test_families_have_their_published_recipes_and_fields_override_them():
    assert choose_recipe(RECIPES, "resenc", SSLTrainer.Config()) == Recipe("sgd", 1e-2, 3e-5, 0.0, 12.0)
    assert choose_recipe(RECIPES, "primus", SSLTrainer.Config(lr=1e-3, clip=3.0)) == Recipe("adamw", 1e-3, 5e-2, 0.05, 3.0)
    sgd = make_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], RECIPES["resenc"])
    assert sgd.defaults["momentum"] == 0.99 and sgd.defaults["nesterov"]


def test_unknown_optimisers_are_refused():
    with pytest.raises(UserError, match="unknown optimizer 'adam'"):
        choose_recipe(RECIPES, "resenc", SSLTrainer.Config(optimizer="adam"))
