"""Recipes, groups and their rates."""

import pytest
import torch
from torch import nn

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn.backbones.base import families
from nnssl_ext.trainers.base import SSLTrainer
from nnssl_ext.trainers.optim import RECIPES, Recipe, choose_recipe, make_optimizer, parameter_groups, set_rates


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


def test_a_method_has_its_own_recipes_and_the_published_ones_for_other_families():
    own = {"primus": Recipe("adamw", 1e-3, 0.04, 0.1, 3.0, (0.9, 0.999))}
    assert choose_recipe(own, "primus", SSLTrainer.Config(lr=2e-3)) == Recipe("adamw", 2e-3, 0.04, 0.1, 3.0, (0.9, 0.999))
    assert choose_recipe(own, "resenc", SSLTrainer.Config()) == RECIPES["resenc"]
    assert make_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], own["primus"]).defaults["betas"] == (0.9, 0.999)


def test_every_family_of_the_package_has_a_recipe_and_others_are_told_to_bring_one():
    assert set(families()) <= set(RECIPES)
    with pytest.raises(UserError, match="no recipe for the backbone family 'mine'"):
        choose_recipe(RECIPES, "mine", SSLTrainer.Config())


def test_rates_of_a_group_are_scaled_and_decay_moves_only_where_it_is_given():
    made = [{"params": [nn.Parameter(torch.zeros(1))], "weight_decay": 0.3, **settings} for settings in ({}, {"lr_scale": 0.5, "wd_scale": 0.0})]
    optimizer = make_optimizer(made, RECIPES["primus"])
    set_rates(optimizer, 0.1)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 0.3), (0.05, 0.3)]
    set_rates(optimizer, 0.2, 0.6)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.2, 0.6), (0.1, 0.0)]


def test_unknown_optimisers_are_refused():
    with pytest.raises(UserError, match="unknown optimizer 'adam'"):
        choose_recipe(RECIPES, "resenc", SSLTrainer.Config(optimizer="adam"))
