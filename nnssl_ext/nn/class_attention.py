"""One vector for a whole image: class-attention layers on top of the token features.

Shape suffixes: B batch, N tokens, C width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

LAYER_SCALE = 0.1  # as in Primus


class ClassAttention(nn.Module):
    """Summarises tokens by a learned query that attends to itself and to them; tokens never see the query.

    The token features stay what the encoder alone gives, so that it can be handed on without this module.

    Args:
        width: channels C.
        heads: attention heads; they divide the width.
        depth: layers.

    Source: Touvron et al. 2021, arXiv:2103.17239 (CaiT), section 2.2.
    """

    def __init__(self, width: int, heads: int, depth: int = 2) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(width))
        self.layers = nn.ModuleList(ClassAttentionLayer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        nn.init.trunc_normal_(self.query, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        """The summary, (B, C)."""
        query_B1C = self.query.expand(len(tokens_BNC), 1, -1)
        for layer in self.layers:
            query_B1C = layer(query_B1C, tokens_BNC)
        summary: Tensor = self.norm(query_B1C[:, 0])
        return summary


class ClassAttentionLayer(nn.Module):
    """Attention of the query over [query, tokens], then an MLP on the query alone; both residual, scaled per channel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((width,), LAYER_SCALE)) for _ in range(2))

    def forward(self, query_B1C: Tensor, tokens_BNC: Tensor) -> Tensor:
        """The next query, (B, 1, C)."""
        query_B1C = query_B1C + self.gamma_1 * self._attend(self.norm1(torch.cat((query_B1C, tokens_BNC), 1)))
        return query_B1C + self.gamma_2 * self.mlp(self.norm2(query_B1C))

    def _attend(self, x: Tensor) -> Tensor:
        q = rearrange(self.q(x[:, :1]), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.kv(x), "b n (two h d) -> two b h n d", two=2, h=self.heads).unbind(0)
        mixed: Tensor = self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
        return mixed
