"""Primus (3D vision transformer with rotary positions) of dynamic-network-architectures as a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nnssl_ext.core.adaptation import EncoderKeys
from nnssl_ext.nn.backbones.base import Backbone, check_divisible, resolve
from nnssl_ext.nn.drop_path import skip_dropped
from nnssl_ext.nn.tokens import gather, patchify


class PrimusBackbone(Backbone):
    """Tokenizer and transformer of Primus; the segmentation decoder depends on the classes and is left out.

    Source: Wald et al. 2025, arXiv:2503.01835.
    """

    family = "primus"
    supports = frozenset({"pyramid", "token_drop"})

    def __init__(self, channels: int, patch_size: Sequence[int], class_name: str, kwargs: dict[str, Any], imports: Sequence[str]) -> None:
        super().__init__(channels, patch_size, class_name, kwargs, imports)
        self.token = tuple(int(t) for t in kwargs["patch_embed_size"])
        check_divisible(patch_size, self.token, "token size")
        self.grid = tuple(size // t for size, t in zip(patch_size, self.token))
        self.width = int(kwargs["embed_dim"])
        self.strides, self.widths = (self.token,), (self.width,)
        net_class: Any = resolve({"net": class_name}, ["net"])["net"]
        self.net = net_class(input_channels=channels, num_classes=2, input_shape=self.patch_size, **resolve(self.kwargs, self.imports))
        self.net.up_projection = nn.Identity()
        for block in self.net.eva.blocks:
            skip_dropped(block)

    def tokens(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        eva, projection = self.net.eva, self.net.down_projection.proj
        patches = patchify(x, self.token)
        positions, rotary = eva.pos_embed, eva.rope.get_embed()
        if keep is not None:  # hidden voxels are dropped before the network sees any of them
            patches = gather(patches, keep)
            positions = gather(positions.expand(len(x), -1, -1), keep)
            rotary = rotary[keep].unsqueeze(1)
        features = eva.pos_drop(F.linear(patches, projection.weight.flatten(1), projection.bias) + positions)
        for block in eva.blocks:
            features = block(features, rope=rotary)
        normed: Tensor = eva.norm(features)
        return normed

    def pyramid(self, x: Tensor) -> list[Tensor]:
        z, y, w = self.grid
        return [rearrange(self.tokens(x), "b (z y x) c -> b c z y x", z=z, y=y, x=w)]

    def adaptation(self) -> EncoderKeys:
        return EncoderKeys("eva", "down_projection", ("down_projection.proj",), "eva.pos_embed")
