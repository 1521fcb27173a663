"""Residual-encoder U-Net of dynamic-network-architectures as a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.core.adaptation import EncoderKeys
from nnssl_ext.nn import sparse
from nnssl_ext.nn.backbones.base import Backbone, check_divisible, resolve


def total_strides(kwargs: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Voxels per cell of each level, (z, y, x), from a network's keyword arguments; of a 2D network along its two axes."""
    return tuple(tuple(int(s) for s in level) for level in np.cumprod(np.asarray(kwargs["strides"]), axis=0))


class ResEncBackbone(Backbone):
    """Encoder and decoder of a ResidualEncoderUNet; the decoder's segmentation layers stay unused and untrained."""

    family = "resenc"
    supports = frozenset({"pyramid", "decoder", "sparse", "volume"})
    instance_norm = True

    def __init__(self, channels: int, patch_size: Sequence[int], class_name: str, kwargs: dict[str, Any], imports: Sequence[str]) -> None:
        super().__init__(channels, patch_size, class_name, kwargs, imports)
        self.strides = self._total_strides()
        self.widths = tuple(int(f) for f in kwargs["features_per_stage"])
        self.decoded = self.widths[0]
        check_divisible(patch_size, self.strides[-1], "total stride")
        net_class: Any = resolve({"net": class_name}, ["net"])["net"]
        self.net = net_class(input_channels=channels, num_classes=2, **resolve(self.kwargs, self.imports))
        self.net.apply(self.net.initialize)
        self.net.decoder.seg_layers.requires_grad_(False)
        sparse.accept_masks(self.net.encoder)

    def pyramid(self, x: Tensor, active: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Feature maps (B, widths[i], z/strides[i], ...), finest first.

        Args:
            active: masks of `sparse.active_levels`: only what is visible is encoded, and maps are zero in inactive cells.
        """
        maps: list[Tensor] = self.net.encoder(x) if active is None else sparse.encode(self.net.encoder, x, active)
        return maps

    def decode(self, maps: list[Tensor]) -> Tensor:
        decoder = self.net.decoder
        features = maps[-1]
        for upsample, stage, skip in zip(decoder.transpconvs, decoder.stages, reversed(maps[:-1])):
            features = stage(torch.cat((upsample(features), skip), 1))
        return features

    def train_decoder(self, on: bool) -> None:
        for part in (self.net.decoder.transpconvs, self.net.decoder.stages):  # the decoder also holds the encoder
            part.requires_grad_(on)

    def adaptation(self) -> EncoderKeys:
        return EncoderKeys("encoder.stages", "encoder.stem", ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"))

    def _total_strides(self) -> tuple[tuple[int, ...], ...]:
        return total_strides(self.kwargs)
