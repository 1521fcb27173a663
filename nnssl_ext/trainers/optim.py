"""Recipes, the optimiser and its parameter groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn.optimizers import SGD, AdamW


@dataclass(frozen=True)
class Recipe:
    """Optimisation settings.

    Args:
        optimizer: "sgd" (with Nesterov momentum) or "adamw".
        lr: learning rate after the warm-up.
        weight_decay: decoupled for adamw; not applied there to biases, norms, positions and mask tokens.
        warmup: share of the steps over which the learning rate rises linearly from 0.
        clip: largest norm of the gradient (of each part, where the parameter groups name parts).
        betas: of adamw.
        sgd_momentum: of sgd.
    """

    optimizer: str
    lr: float
    weight_decay: float
    warmup: float
    clip: float
    betas: tuple[float, float] = (0.9, 0.98)
    sgd_momentum: float = 0.99


# U-Nets as nnU-Net trains them (doi:10.1038/s41592-020-01008-z); transformers as Primus (arXiv:2503.01835)
_PRIMUS = Recipe("adamw", 3e-4, 5e-2, 0.05, 1.0)
RECIPES = {"resenc": Recipe("sgd", 1e-2, 3e-5, 0.0, 12.0), **dict.fromkeys(("primus", "primus_v2", "segformer3d"), _PRIMUS)}


def choose_recipe(recipes: Mapping[str, Recipe], family: str, config: Any) -> Recipe:
    """The family's recipe, of RECIPES where `recipes` has none, with what `config` sets (its fields of the same names that are not None).

    Raises:
        UserError: unknown optimiser; a family without a recipe.
    """
    chosen = {f.name: getattr(config, f.name, None) for f in dataclasses.fields(Recipe)}
    if chosen["optimizer"] not in (None, "sgd", "adamw"):
        raise UserError(f"unknown optimizer '{chosen['optimizer']}'", "option -o optimizer", "known: sgd, adamw")
    known = {**RECIPES, **recipes}
    if family not in known:
        raise UserError(f"there is no recipe for the backbone family '{family}'", "`recipes` of the trainer", "add one there")
    return dataclasses.replace(known[family], **{key: value for key, value in chosen.items() if value is not None})


def parameter_groups(model: nn.Module, weight_decay: float, spare: bool) -> list[dict]:
    """Every trainable parameter in exactly one group; with `spare`, vectors and embeddings get no weight decay."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (spared if spare and (parameter.ndim < 2 or name.endswith(("pos_embed", "mask_token"))) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: list[dict], recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return SGD(groups, lr=recipe.lr, momentum=recipe.sgd_momentum, nesterov=True)
    return AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float | None = None, frozen: Collection[str] = ()) -> None:
    """Learning rate and weight decay of every group.

    Args:
        lr: times a group's "lr_scale", where it has one.
        weight_decay: times a group's "wd_scale", where it has one; None leaves it as it is.
        frozen: names of groups whose learning rate is 0.
    """
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if group.get("name") in frozen else lr * group.get("lr_scale", 1.0)
        if weight_decay is not None:
            group["weight_decay"] = weight_decay * group.get("wd_scale", 1.0)
