"""Projection heads: unit vectors whatever the precision."""

import pytest
import torch
from torch import nn

from nnssl_ext.nn.heads import ProjectionHead


def head(**sizes) -> ProjectionHead:
    torch.manual_seed(0)
    return ProjectionHead(**{"width": 6, "hidden": 10, "bottleneck": 5, "prototypes": 12, **sizes})


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_head_is_linear_layers_with_gelu_between_them_and_then_the_unit_sphere(layers):
    made = head(layers=layers).double()
    linear = [module for module in made.mlp if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == {1: [(6, 5)], 2: [(6, 10), (10, 5)], 3: [(6, 10), (10, 10), (10, 5)]}[layers]
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = x
    for number, layer in enumerate(linear):
        expected = expected if number == 0 else 0.5 * expected * (1 + torch.erf(expected / 2**0.5))
        expected = expected @ layer.weight.T + layer.bias
    torch.testing.assert_close(made(x), expected / expected.square().sum(1, keepdim=True).sqrt(), rtol=1e-12, atol=0)


def test_vectors_and_prototypes_have_unit_length_in_single_precision_also_under_autocast():
    made = head()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = made(torch.randn(4, 7, 6)), made.directions()
    assert [(x.dtype, tuple(x.shape)) for x in found] == [(torch.float32, (4, 7, 5)), (torch.float32, (12, 5))]
    for x in found:
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(x.shape[:-1]), rtol=1e-6, atol=0)


def test_the_length_of_a_prototype_has_no_gradient():
    made = head().double()
    (made.directions() * torch.randn(12, 5, dtype=torch.float64)).sum().backward()
    along, whole = (made.prototypes * made.prototypes.grad).sum(1).abs(), made.prototypes.grad.norm(dim=1) * made.prototypes.norm(dim=1)
    assert bool((whole > 1e-3).all()) and bool((along < 1e-12 * whole).all())


def test_weights_start_small_and_biases_at_zero():
    made = head(width=64, hidden=256, prototypes=500, bottleneck=64)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            assert bool((parameter == 0).all())
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_no_features_give_no_vectors_and_gradients_of_zeros():
    made = head()
    x = torch.zeros(0, 6, requires_grad=True)
    z = made(x)
    assert z.shape == (0, 5)
    z.sum().backward()
    assert x.grad.shape == (0, 6)
    assert all(bool((parameter.grad == 0).all()) for parameter in made.mlp.parameters())


def test_features_of_zeros_have_finite_vectors_and_gradients():
    made = head()
    z = made(torch.zeros(2, 6))
    z.sum().backward()
    assert bool((z == 0).all()) and all(bool(parameter.grad.isfinite().all()) for parameter in made.mlp.parameters())
