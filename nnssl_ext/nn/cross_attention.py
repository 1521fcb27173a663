"""Tokens that read a memory: blocks of self-attention, cross-attention and MLP.

Shape suffixes: B batch, N tokens, M tokens of the memory, C width.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class CrossAttentionBlock(nn.Module):
    """Tokens attend to each other (optionally), then to a memory, then pass an MLP; all of it residual, each part behind a norm.

    Positions are the caller's: add them to the tokens and to the memory.

    Args:
        width: channels C of tokens and memory.
        heads: attention heads; they divide the width.
        self_attention: whether the tokens attend to each other before they read the memory.
        ratio: hidden channels of the MLP over the width.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1 (decoder); Xiong et al. 2020, arXiv:2002.04745 (norms before each part).
    """

    def __init__(self, width: int, heads: int, self_attention: bool = True, ratio: int = 4) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(width) if self_attention else None
        self.self_attention = Attention(width, heads) if self_attention else None
        self.norm, self.memory_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens_BNC: Tensor, memory_BMC: Tensor) -> Tensor:
        """The next tokens, (B, N, C)."""
        if self.self_attention is not None and self.self_norm is not None:
            own = self.self_norm(tokens_BNC)
            tokens_BNC = tokens_BNC + self.self_attention(own, own)
        tokens_BNC = tokens_BNC + self.attention(self.norm(tokens_BNC), self.memory_norm(memory_BMC))
        return tokens_BNC + self.mlp(self.mlp_norm(tokens_BNC))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Every token's mean of the memory's values, weighted by softmax(query . key / sqrt(channels of a head))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, tokens_BNC: Tensor, memory_BMC: Tensor) -> Tensor:
        """(B, N, C)."""
        query = rearrange(self.q(tokens_BNC), "b n (h d) -> b h n d", h=self.heads)
        key, value = rearrange(self.kv(memory_BMC), "b m (two h d) -> two b h m d", two=2, h=self.heads)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(rearrange(mixed, "b h n d -> b n (h d)"))  # type: ignore[no-any-return]
