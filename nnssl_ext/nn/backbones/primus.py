"""Primus (3D vision transformer with rotary positions) of dynamic-network-architectures as a backbone.

Shape suffixes: B batch, N tokens, K kept tokens, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nnssl_ext.core.adaptation import EncoderKeys
from nnssl_ext.nn.backbones.base import Backbone, check_divisible, resolve
from nnssl_ext.nn.drop_path import skip_dropped
from nnssl_ext.nn.swiglu import recompute_gate
from nnssl_ext.nn.tokens import gather, patchify, resize_positions

_ROTARY_TABLES = 16  # grids whose rotary positions are kept; a method uses two or three


class PrimusBackbone(Backbone):
    """Tokenizer and transformer of Primus; the segmentation decoder depends on the classes and is left out.

    Takes inputs of any size: rotary positions advance by one unit per token everywhere, learned positions are
    interpolated from the planned grid. On the planned patch the features are those of the library's network.

    Attributes:
        token: voxels of a token, (z, y, x).
        grid: tokens of the planned patch, (z, y, x).
        width: channels of a token's features.
        registers: learned tokens beside those of the image.

    Source: Wald et al. 2025, arXiv:2503.01835.
    """

    family = "primus"
    supports = frozenset({"pyramid", "token_drop", "mask_token", "any_size", "volume"})

    def __init__(self, channels: int, patch_size: Sequence[int], class_name: str, kwargs: dict[str, Any], imports: Sequence[str]) -> None:
        super().__init__(channels, patch_size, class_name, kwargs, imports)
        self.token = tuple(int(t) for t in kwargs["patch_embed_size"])
        check_divisible(patch_size, self.token, "token size")
        self.grid = self.grid_of(patch_size)
        self.width = int(kwargs["embed_dim"])
        self.strides, self.widths = (self.token,), (self.width,)
        net_class: Any = resolve({"net": class_name}, ["net"])["net"]
        self.net = net_class(input_channels=channels, num_classes=2, input_shape=self.patch_size, **resolve(self.kwargs, self.imports))
        self.net.up_projection = nn.Identity()
        self.registers = int(self.net.eva.num_prefix_tokens)
        for block in self.net.eva.blocks:
            skip_dropped(block)
            recompute_gate(block.mlp)
        self._tables: dict[Any, Tensor] = {}

    def grid_of(self, size: Sequence[int]) -> tuple[int, ...]:
        """Tokens along (z, y, x) of an input of `size` voxels.

        Raises:
            UserError: an axis that the token does not divide.
        """
        check_divisible(size, self.token, "token size", "input size", f"{self.family} backbone")
        return tuple(edge // t for edge, t in zip(size, self.token))

    def tokens(
        self,
        x: Tensor,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        *,
        placeless: Tensor | None = None,
        registers: bool = False,
    ) -> Tensor:
        """Token features (B, N, C) of an input of any size that the token divides.

        Args:
            x: (B, channels, z, y, x); or tokens that are embedded already, (B, K, C), which lie at the places `keep` of the
                planned grid, some of them perhaps at the same one.
            keep: (B, K) indices; only these tokens are read and encoded, the result is (B, K, C). Not together with `mask`.
            mask: (B, N) bool, which tokens are hidden: their voxels have no influence.
            mask_token: (C,), what stands for a hidden token; its position is added as to any other.
            placeless: (1 or B, G, C), further tokens without a position; they come before all others, also in the result.
            registers: whether the register tokens come along, before all others.

        Raises:
            UserError: an axis that the token does not divide.
        """
        assert keep is None or mask is None
        embedded = x.ndim == 3
        eva, grid = self.net.eva, self.grid if embedded else self.grid_of(x.shape[2:])
        features, rotary, extra = x if embedded else self._embed(x, keep, mask), self._rotary(grid), self.net.register_tokens
        if mask is not None and mask_token is not None:
            features = torch.where(mask[..., None], mask_token.to(features.dtype), features)
        if eva.pos_embed is not None:
            first, positions = eva.pos_embed.split((self.registers, eva.pos_embed.shape[1] - self.registers), 1)
            positions = resize_positions(positions, self.grid, grid)
            features = features + (positions if keep is None else gather(positions.expand(len(x), -1, -1), keep))
            extra = None if extra is None else extra + first
        if keep is not None and rotary is not None:
            rotary = rotary[keep].unsqueeze(1)
        if placeless is not None:
            features = torch.cat((placeless.to(features.dtype).expand(len(x), -1, -1), features), 1)
            rotary = None if rotary is None else _unturned(rotary, placeless.shape[1])
        if extra is not None:
            features = torch.cat((extra.expand(len(x), -1, -1), features), 1)
        features = eva.pos_drop(features)
        for block in eva.blocks:
            features = block(features, rope=rotary)
        normed: Tensor = eva.norm(features)
        return normed if registers else normed[:, self.registers :]

    def pyramid(self, x: Tensor) -> list[Tensor]:
        z, y, w = self.grid_of(x.shape[2:])
        return [rearrange(self.tokens(x), "b (z y x) c -> b c z y x", z=z, y=y, x=w)]

    def layer_ids(self) -> list[tuple[nn.Parameter, int]]:
        """Every parameter with its depth: 0 tokenizer, positions and registers, i + 1 block i, and the final norm above all blocks."""
        eva = self.net.eva
        above = {parameter: layer for layer, module in enumerate((*eva.blocks, eva.norm), start=1) for parameter in module.parameters()}
        return [(parameter, above.get(parameter, 0)) for parameter in self.net.parameters()]

    def adaptation(self) -> EncoderKeys:
        return EncoderKeys("eva", "down_projection", ("down_projection.proj",), None if self.net.eva.pos_embed is None else "eva.pos_embed")

    def _embed(self, x: Tensor, keep: Tensor | None, mask: Tensor | None) -> Tensor:
        """Embedded patches, (B, N, C) or (B, K, C). Voxels of dropped and of hidden tokens are not read, not even where they are NaN."""
        patches, projection = patchify(x, self.token), self.net.down_projection.proj
        if keep is not None:
            patches = gather(patches, keep)
        if mask is not None:
            patches = patches.masked_fill(mask[..., None], 0.0)  # the projection's gradient would see them otherwise
        return F.linear(patches, projection.weight.flatten(1), projection.bias)

    def _rotary(self, grid: tuple[int, ...]) -> Tensor | None:
        """Sines and cosines of the rotary positions, (N, 2 * channels of a head); None without them.

        Source: Su et al. 2021, arXiv:2104.09864; per axis, a token's index times the frequencies of a third of the channels.
        """
        rope = self.net.eva.rope
        if rope is None:
            return None
        planned: Tensor = rope.get_embed()
        if grid == self.grid:
            return planned
        key = (grid, planned.device, planned.dtype)
        if key not in self._tables:
            if len(self._tables) == _ROTARY_TABLES:
                self._tables.clear()
            with torch.inference_mode(False):  # a table that was first needed in inference serves training, too
                other = type(rope)(rope.dim, in_pixels=False, feat_shape=grid, ref_feat_shape=grid, **(self.kwargs.get("rope_kwargs") or {}))
                self._tables[key] = other.get_embed().to(planned)
        return self._tables[key]


def _unturned(rotary: Tensor, count: int) -> Tensor:
    """Sines and cosines (..., N, 2 D) with those of `count` tokens before them that are not turned: 0 and 1."""
    sine = rotary.new_zeros((*rotary.shape[:-2], count, rotary.shape[-1] // 2))
    return torch.cat((torch.cat((sine, sine + 1), -1), rotary), -2)
