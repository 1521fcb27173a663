"""Primus V2: the transformer of Primus on a convolutional tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from einops import rearrange
from torch import Tensor, nn

from nnssl_ext.core.adaptation import EncoderKeys
from nnssl_ext.core.errors import UserError
from nnssl_ext.nn.backbones.primus import PrimusBackbone
from nnssl_ext.nn.tokens import gather, unpatchify

TOKEN = (8, 8, 8)  # the tokenizer halves every axis three times


class PrimusV2Backbone(PrimusBackbone):
    """As `PrimusBackbone`, but for the embedding: residual convolutions whose receptive field reaches into neighbouring tokens.

    That is why hidden voxels are set to 0 before the tokenizer sees them, and why no method that encodes visible tokens
    alone is offered.

    Source: `PrimusV2` of dynamic-network-architectures.
    """

    family = "primus_v2"
    supports = PrimusBackbone.supports - {"token_drop"}

    def __init__(self, channels: int, patch_size: Sequence[int], class_name: str, kwargs: dict[str, Any], imports: Sequence[str]) -> None:
        if tuple(kwargs["patch_embed_size"]) != TOKEN:
            raise UserError(f"the tokens of Primus V2 have 8x8x8 voxels, not {kwargs['patch_embed_size']}", "patch_embed_size of the plan", "use -b primus")
        super().__init__(channels, patch_size, class_name, kwargs, imports)

    def grid_of(self, size: Sequence[int]) -> tuple[int, ...]:
        grid = super().grid_of(size)
        if max(grid) == 1:
            raise UserError("the input is a single token, which instance normalisation cannot take", f"{self.family} backbone", "choose a larger patch")
        return grid

    def adaptation(self) -> EncoderKeys:
        """The input enters the stem's first convolution and its shortcut, each of which has two names."""
        modules = self.net.down_projection.stem.blocks[0].named_modules(prefix="down_projection.stem.blocks.0", remove_duplicate=False)
        reading = tuple(name for name, module in modules if isinstance(module, nn.Conv3d) and name.split(".")[4] in ("conv1", "skip"))
        return EncoderKeys("eva", "down_projection", reading, super().adaptation().positions)

    def _embed(self, x: Tensor, keep: Tensor | None, mask: Tensor | None) -> Tensor:
        if mask is not None:
            hidden = unpatchify(mask[..., None].expand(-1, -1, int(np.prod(TOKEN))), self.grid_of(x.shape[2:]), TOKEN)
            x = x.masked_fill(hidden, 0.0)
        features = rearrange(self.net.down_projection(x), "b c z y x -> b (z y x) c")
        return features if keep is None else gather(features, keep)
