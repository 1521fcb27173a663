"""Class attention against plain loops."""

import math

import pytest
import torch
from torch import nn

from nnssl_ext.nn.class_attention import ClassAttention


def build(width=24, heads=3, depth=2):
    torch.manual_seed(0)
    module = ClassAttention(width, heads, depth).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def norm(v, layer):
    mean = sum(v) / len(v)
    variance = sum((x - mean) ** 2 for x in v) / len(v)
    return [(x - mean) / math.sqrt(variance + 1e-5) * float(w) + float(b) for x, w, b in zip(v, layer.weight, layer.bias)]


def linear(v, weight, bias):
    return [sum(float(w) * x for w, x in zip(row, v)) + float(b) for row, b in zip(weight, bias)]


def summarise(module, tokens):
    """The summary of one sample's tokens (lists of floats), number by number."""
    query = [float(q) + sum(column) / len(tokens) for q, column in zip(module.query, zip(*tokens))]
    for layer in module.layers:
        rows = [norm(row, layer.norm1) for row in [query, *tokens]]
        width, size = len(query), len(query) // layer.heads
        q = linear(rows[0], layer.q.weight, layer.q.bias)
        keys = [linear(row, layer.kv.weight[:width], layer.kv.bias[:width]) for row in rows]
        values = [linear(row, layer.kv.weight[width:], layer.kv.bias[width:]) for row in rows]
        mixed = []
        for head in range(layer.heads):
            part = range(head * size, (head + 1) * size)
            weights = [math.exp(sum(q[i] * key[i] for i in part) / math.sqrt(size)) for key in keys]
            mixed += [sum(w * value[i] for w, value in zip(weights, values)) / sum(weights) for i in part]
        query = [x + float(g) * y for x, g, y in zip(query, layer.gamma_1, linear(mixed, layer.proj.weight, layer.proj.bias))]
        hidden = linear(norm(query, layer.norm2), layer.mlp[0].weight, layer.mlp[0].bias)
        hidden = [x / 2 * (1 + math.erf(x / math.sqrt(2))) for x in hidden]
        query = [x + float(g) * y for x, g, y in zip(query, layer.gamma_2, linear(hidden, layer.mlp[2].weight, layer.mlp[2].bias))]
    return norm(query, module.norm)


@pytest.mark.parametrize(("heads", "depth", "count"), [(3, 2, 7), (1, 1, 1), (4, 3, 5)])
@torch.no_grad()
def test_the_summary_equals_plain_loops(heads, depth, count):
    module, tokens = build(heads=heads, depth=depth), torch.randn(2, count, 24, dtype=torch.float64)
    expected = torch.tensor([summarise(module, sample.tolist()) for sample in tokens], dtype=torch.float64)
    assert torch.allclose(module(tokens), expected, rtol=1e-9, atol=1e-10)


def test_the_order_of_the_tokens_does_not_matter_but_every_token_does():
    module, tokens = build(), torch.randn(1, 9, 24, dtype=torch.float64, requires_grad=True)
    summary = module(tokens)
    assert torch.allclose(module(tokens[:, torch.randperm(9)]), summary)
    summary.square().sum().backward()
    assert bool((tokens.grad.abs().sum(-1) > 0).all()) and all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())


def test_a_fresh_module_starts_with_small_weights_and_layer_scale_a_tenth():
    torch.manual_seed(0)
    module = ClassAttention(96, 2)
    assert all(bool((scale == 0.1).all()) for layer in module.layers for scale in (layer.gamma_1, layer.gamma_2))
    weights = [m.weight for m in module.modules() if isinstance(m, nn.Linear)]
    assert all(0.018 < weight.std() < 0.022 for weight in weights) and 0.01 < module.query.std() < 0.03
    assert all(bool((m.bias == 0).all()) for m in module.modules() if isinstance(m, nn.Linear))
