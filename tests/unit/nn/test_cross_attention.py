"""Blocks that read a memory, against plain loops."""

import math

import pytest
import torch
from torch import nn

from nnssl_ext.nn.cross_attention import CrossAttentionBlock


def build(width=12, heads=3, self_attention=True):
    torch.manual_seed(0)
    block = CrossAttentionBlock(width, heads, self_attention, ratio=2).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def norm(v, layer):
    mean = sum(v) / len(v)
    variance = sum((x - mean) ** 2 for x in v) / len(v)
    return [(x - mean) / math.sqrt(variance + 1e-5) * float(w) + float(b) for x, w, b in zip(v, layer.weight, layer.bias)]


def linear(v, layer):
    return [sum(float(w) * x for w, x in zip(row, v)) + float(b) for row, b in zip(layer.weight, layer.bias)]


def attend(rows, memory, layer):
    """What every row reads of the memory, number by number."""
    size, width, found = len(rows[0]) // layer.heads, len(rows[0]), []
    pairs = [linear(row, layer.kv) for row in memory]
    for row in rows:
        query, mixed = linear(row, layer.q), []
        for head in range(layer.heads):
            part = range(head * size, (head + 1) * size)
            weights = [math.exp(sum(query[i] * pair[i] for i in part) / math.sqrt(size)) for pair in pairs]
            mixed += [sum(w * pair[width + i] for w, pair in zip(weights, pairs)) / sum(weights) for i in part]
        found.append(linear(mixed, layer.proj))
    return found


def added(rows, more):
    return [[x + y for x, y in zip(row, other)] for row, other in zip(rows, more)]


def expected(block, tokens, memory):
    if block.self_attention is not None:
        own = [norm(row, block.self_norm) for row in tokens]
        tokens = added(tokens, attend(own, own, block.self_attention))
    tokens = added(tokens, attend([norm(row, block.norm) for row in tokens], [norm(row, block.memory_norm) for row in memory], block.attention))
    hidden = [linear(norm(row, block.mlp_norm), block.mlp[0]) for row in tokens]
    hidden = [[x / 2 * (1 + math.erf(x / math.sqrt(2))) for x in row] for row in hidden]
    return added(tokens, [linear(row, block.mlp[2]) for row in hidden])


@pytest.mark.parametrize("self_attention", [True, False])
@pytest.mark.parametrize(("heads", "count", "remembered"), [(3, 4, 5), (1, 1, 3), (4, 5, 1)])
@torch.no_grad()
def test_a_block_equals_plain_loops(heads, count, remembered, self_attention):
    block = build(heads=heads, self_attention=self_attention)
    tokens, memory = torch.randn(2, count, 12, dtype=torch.float64), torch.randn(2, remembered, 12, dtype=torch.float64)
    loops = [expected(block, one.tolist(), other.tolist()) for one, other in zip(tokens, memory)]
    assert torch.allclose(block(tokens, memory), torch.tensor(loops, dtype=torch.float64), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("self_attention", [True, False])
def test_a_token_sees_all_of_the_memory_and_other_tokens_only_by_self_attention(self_attention):
    block = build(self_attention=self_attention)
    tokens, memory = (torch.randn(1, n, 12, dtype=torch.float64, requires_grad=True) for n in (4, 5))
    block(tokens, memory)[0, 1].sum().backward()
    assert memory.grad.abs().amax(2).gt(0).all()
    assert tokens.grad.abs().amax(2).gt(0).tolist() == [[self_attention, True, self_attention, self_attention]]


def test_the_order_of_the_memory_does_not_matter():
    block, order = build(), torch.tensor([3, 0, 4, 1, 2])
    tokens, memory = torch.randn(2, 4, 12, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    assert torch.allclose(block(tokens, memory), block(tokens, memory[:, order]), rtol=1e-12, atol=1e-12)


def test_every_parameter_is_trained_and_a_fresh_block_changes_little():
    block = CrossAttentionBlock(12, 3)
    tokens, memory = torch.randn(2, 4, 12), torch.randn(2, 5, 12)
    out = block(tokens, memory)
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    assert float((out - tokens).detach().norm()) < 0.2 * float(tokens.norm())
