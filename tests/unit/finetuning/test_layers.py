"""Learning rates that fall layer by layer, of networks with a segmentation decoder."""

import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.finetuning.layers import finetuning_groups
from nnssl_ext.finetuning.networks import AdapterPrimus, PlannedPrimus, PlannedPrimusV2, PlannedSegFormer3D

pytestmark = pytest.mark.nnunet
KWARGS = {"embed_dim": 48, "eva_depth": 3, "eva_numheads": 2, "patch_embed_size": (8, 8, 8), "input_shape": (16, 16, 16), "num_register_tokens": 2}
STAGES = {"features_per_stage": [8, 16], "n_blocks_per_stage": [1, 2], "decoder_width": 12, "encoder_strides": [[4, 4, 4], [2, 2, 2]]}


def layers_below(name, top):
    """How many layers a parameter lies below the final norm."""
    parts = name.split(".")
    if parts[0] == "eva":
        return {"blocks": lambda: top - 1 - int(parts[2]), "norm": lambda: 0, "pos_embed": lambda: top}[parts[1]]()
    if parts[0] in ("down_projection", "register_tokens") or name.startswith("encoder.stem"):
        return top
    if parts[0] == "encoder":  # stages of 1 and 2 blocks
        stage, part = int(parts[2]), parts[3]
        block = [1, 2][stage] + int(parts[4]) if part == "blocks" else {"embedding": [None, 2], "norm": [1, 4]}[part][stage]
        return top - block
    return 0


@pytest.mark.parametrize(("cls", "kwargs"), [(PlannedPrimus, KWARGS), (PlannedPrimusV2, KWARGS), (PlannedSegFormer3D, STAGES)])
def test_every_parameter_learns_at_the_rate_of_its_layer(cls, kwargs):
    network, groups, top = cls(1, 2, **kwargs), None, 4
    groups = finetuning_groups(network, 0.05, 0.5)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {names.pop(id(parameter)): group for group in groups for parameter in group["params"]}  # none twice
    assert not names
    for name, group in found.items():
        assert group["lr_scale"] == 0.5 ** layers_below(name, top), name
        decays = network.get_parameter(name).ndim > 1 and not name.endswith(("pos_embed", "register_tokens"))
        assert group["weight_decay"] == (0.05 if decays else 0.0), name
    assert {group["lr_scale"] for group in groups} == {0.5**layer for layer in range(top + 1)}


def test_frozen_parameters_are_in_no_group():
    network = AdapterPrimus(1, 2, frozen=["eva", "down_projection", "register_tokens"], **KWARGS)
    groups = finetuning_groups(network, 0.05, 0.5)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in network.decoder.parameters()}
    assert {group["lr_scale"] for group in groups} == {1.0}


def test_a_network_without_transformer_blocks_is_refused():
    with pytest.raises(UserError, match="for transformers"):
        finetuning_groups(torch.nn.Linear(2, 2), 0.05, 0.5)
