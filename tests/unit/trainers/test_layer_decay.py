"""Expected rates of every layer, and that every parameter is in exactly one group."""

import pytest
import torch
from torch import nn

from nnssl_ext.nn.backbones.base import build_backbone
from nnssl_ext.nn.class_attention import ClassAttention
from nnssl_ext.nn.heads import ProjectionHead
from nnssl_ext.trainers.layer_decay import layer_decay, layer_groups
from nnssl_ext.trainers.optim import RECIPES, make_optimizer, set_rates
from tests.make_data import tiny_plan

BASE = 1e-3
# learning rates over the base rate, written out: each .9 (4 blocks) or .95 (24) times the one above
TABLE_4 = {"patch embedding": 0.118098, "tokens": 0.59049, "blocks": [0.6561, 0.729, 0.81, 0.9], "norm": 1.0}
TABLE_24 = {
    "patch embedding": 0.0554779,
    "tokens": 0.2773896,
    "blocks": [0.2919890, 0.3073569, 0.3235335, 0.3405616, 0.3584859, 0.3773536, 0.3972143, 0.4181203, 0.4401267, 0.4632912, 0.4876750, 0.5133421]
    + [0.5403601, 0.5688001, 0.5987369, 0.6302494, 0.6634204, 0.6983373, 0.7350919, 0.7737809, 0.8145063, 0.857375, 0.9025, 0.95],
    "norm": 1.0,
}


class Student(nn.Module):
    """What a method of self-distillation trains, in small."""

    def __init__(self, depth: int, registers: int = 0) -> None:
        super().__init__()
        plan = tiny_plan()
        config = plan.configuration("3d_fullres")
        config.networks["primus"].kwargs.update(eva_depth=depth, num_register_tokens=registers)
        self.backbone = build_backbone(config, "primus", 1)
        self.mask_token = nn.Parameter(torch.zeros(48))
        self.summary = ClassAttention(48, 2)
        self.dino_head, self.ibot_head = (ProjectionHead(48, hidden=32, bottleneck=8, prototypes=16) for _ in range(2))

    def groups(self, **options) -> list[dict]:
        layers = [*self.backbone.layer_ids(), (self.mask_token, 0)]
        prototypes = [self.dino_head.prototypes, self.ibot_head.prototypes]
        return layer_groups(self, layers, self.backbone.net.down_projection, 0.04, last_layers=prototypes, **options)


def by_name(student, groups):
    """Each parameter's group."""
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


def expected(name, table):
    if ".down_projection." in name:
        return table["patch embedding"]
    if name == "mask_token" or name.endswith(("pos_embed", "register_tokens")):
        return table["tokens"]
    if ".eva.blocks." in name:
        return table["blocks"][int(name.split(".eva.blocks.")[1].split(".")[0])]
    return table["norm"]


@pytest.mark.parametrize(("depth", "table", "registers"), [(4, TABLE_4, 0), (4, TABLE_4, 3), (24, TABLE_24, 0)])
def test_every_parameter_learns_at_the_rate_of_its_layer(depth, table, registers):
    student = Student(depth, registers)
    optimizer = make_optimizer(student.groups(), RECIPES["primus"])
    set_rates(optimizer, BASE)
    found = {name: group["lr"] / BASE for name, group in by_name(student, optimizer.param_groups).items()}
    assert found == pytest.approx({name: expected(name, table) for name, _ in student.named_parameters()}, rel=1e-6)
    assert len(table["blocks"]) == depth and ("backbone.net.register_tokens" in found) == bool(registers)


def test_every_trainable_parameter_is_in_exactly_one_group_and_frozen_ones_in_none():
    student = Student(2)
    student.backbone.net.eva.norm.requires_grad_(False)
    listed = [id(parameter) for group in student.groups() for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in student.parameters() if parameter.requires_grad)
    assert len(listed) == len(set(listed)) == len(list(student.parameters())) - 2


def test_vectors_and_embeddings_get_no_weight_decay():
    student = Student(2, registers=3)
    for name, group in by_name(student, student.groups()).items():
        spared = name.endswith((".bias", "pos_embed", "register_tokens", "mask_token", "query", "gamma_1", "gamma_2")) or ".norm" in name
        assert (group["wd_scale"], group["weight_decay"]) == ((0.0, 0.0) if spared else (1.0, 0.04)), name


def test_parts_are_the_backbone_with_the_mask_token_and_every_other_child():
    student = Student(2)
    parts = {name: group["part"] for name, group in by_name(student, student.groups()).items()}
    assert parts.pop("mask_token") == "backbone"
    assert parts == {name: name.split(".")[0] for name in parts}
    assert set(parts.values()) == {"backbone", "summary", "dino_head", "ibot_head"}


def test_prototypes_have_groups_of_their_own_that_can_be_frozen():
    student = Student(2)
    optimizer = make_optimizer(student.groups(), RECIPES["primus"])
    last, others = [[group for group in optimizer.param_groups if (group["name"] == "last_layer") == wanted] for wanted in (True, False)]
    assert [(group["part"], len(group["params"])) for group in last] == [("dino_head", 1), ("ibot_head", 1)]
    set_rates(optimizer, BASE, 0.1, frozen=("last_layer",))
    assert [group["lr"] for group in last] == [0, 0]
    assert all(group["lr"] > 0 for group in others)
    assert all(group["weight_decay"] == 0.1 * group["wd_scale"] for group in optimizer.param_groups)
    set_rates(optimizer, BASE, 0.1)
    assert [group["lr"] for group in last] == [BASE, BASE]


def test_groups_of_equal_settings_are_one():
    groups = Student(2).groups()
    settings = [(group["part"], group["name"], group["lr_scale"], group["wd_scale"]) for group in groups]
    assert len(set(settings)) == len(settings)
    assert len(groups) == 3 + 2 * 2 + 1 + 2 + 2 * 3  # embeddings, matrix and bias of the tokenizer; blocks; norm; summary; heads


def test_the_tokenizer_is_known_by_its_module_and_not_by_a_name():
    student = Student(2)
    student.backbone.net.stem = student.backbone.net.down_projection
    del student.backbone.net.down_projection
    layers = [*student.backbone.layer_ids(), (student.mask_token, 0)]
    found = by_name(student, layer_groups(student, layers, student.backbone.net.stem, 0.04))
    assert found["backbone.net.stem.proj.weight"]["lr_scale"] == pytest.approx(0.2 * 0.9**3)


@pytest.mark.parametrize(("depth", "decay"), [(12, 0.9), (16, 0.95), (24, 0.95)])  # S and B; M; L
def test_deeper_networks_decay_less_so_that_their_stem_still_learns(depth, decay):
    assert layer_decay(depth) == decay
    assert 0.2 * layer_decay(depth) ** (depth + 1) > 0.05


def test_decay_one_and_no_factor_give_every_layer_the_same_rate():
    assert {group["lr_scale"] for group in Student(2).groups(decay=1.0, embed_scale=1.0)} == {1.0}
