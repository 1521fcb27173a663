"""A transformer over the tokens of a 3D grid."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

HEAD_WIDTH = 48  # channels per attention head; rotary positions in 3D need a multiple of 6


def transformer(width: int, depth: int, grid: Sequence[int]) -> nn.Module:
    """Blocks as those of Primus, with learned and rotary positions: (B, N, width) -> (B, N, width) and None.

    Args:
        width: channels, a multiple of `HEAD_WIDTH`.
        depth: number of blocks.
        grid: tokens along (z, y, x); N is their product.

    Source: Fang et al. 2023, arXiv:2303.11331 (EVA-02); Wald et al. 2025, arXiv:2503.01835.
    """
    # here: it brings timm, torchvision and PyTorch's compiler, 5 seconds that a method without transformer need not wait for
    from dynamic_network_architectures.building_blocks.eva import Eva

    blocks: nn.Module = Eva(width, depth, width // HEAD_WIDTH, ref_feat_shape=tuple(grid), init_values=0.1, scale_attn_inner=True)
    return blocks
