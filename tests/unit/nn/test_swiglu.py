"""A gated MLP that recomputes its activation."""

import copy

import pytest
import torch
from timm.layers import SwiGLU
from torch.autograd.graph import saved_tensors_hooks

from nnssl_ext.nn.swiglu import recompute_gate


def pair(drop=0.0):
    torch.manual_seed(0)
    plain = SwiGLU(12, 32, norm_layer=torch.nn.LayerNorm, drop=drop)
    lean = copy.deepcopy(plain)
    recompute_gate(lean)
    return plain, lean


def run(mlp, x, **kwargs):
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", **kwargs):
        y = mlp(x)
    y.float().square().sum().backward()
    return [y, x.grad, *(parameter.grad for parameter in mlp.parameters())]


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("autocast", [False, True])
def test_values_and_gradients_are_those_of_the_plain_one(drop, autocast):
    x = torch.randn(3, 7, 12)
    for mine, theirs in zip(*(run(mlp, x, enabled=autocast, dtype=torch.bfloat16) for mlp in reversed(pair(drop)))):
        assert torch.equal(mine, theirs)


def test_two_tensors_of_the_hidden_width_less_are_saved():
    counts = []
    for mlp in pair():
        held = {}

        def pack(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other one takes its place
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = mlp(torch.randn(50, 12, requires_grad=True))
        counts.append(sum(tensor.numel() == 50 * 32 for tensor in held.values()))
        del output
    assert counts == [5, 3]


def test_a_copy_is_as_lean_and_inference_is_plain():
    plain, lean = pair()
    twin, x = copy.deepcopy(lean), torch.randn(2, 12)
    assert twin.forward.__self__ is twin
    with torch.inference_mode():
        assert torch.equal(twin(x), plain(x))
