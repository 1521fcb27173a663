"""SegFormer3D as a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_ext.core.adaptation import EncoderKeys
from nnssl_ext.nn.backbones.base import Backbone, check_divisible, resolve
from nnssl_ext.nn.backbones.resenc import total_strides
from nnssl_ext.nn.segformer3d import upsample


class SegFormer3DBackbone(Backbone):
    """Encoder and decoder of a SegFormer3D; its segmentation layer stays unused and untrained.

    The finest map has cells of about four voxels; so have the decoder's features before they are interpolated, and the dense
    features: all maps, interpolated as for the decoder and side by side.

    Source: Perera et al. 2024, arXiv:2404.10156.
    """

    family = "segformer3d"
    supports = frozenset({"pyramid", "decoder", "volume"})

    def __init__(self, channels: int, patch_size: Sequence[int], class_name: str, kwargs: dict[str, Any], imports: Sequence[str]) -> None:
        super().__init__(channels, patch_size, class_name, kwargs, imports)
        self.strides = total_strides(kwargs)
        self.widths, self.decoded = tuple(int(f) for f in kwargs["features_per_stage"]), int(kwargs["decoder_width"])
        check_divisible(patch_size, self.strides[-1], "total stride")
        net_class: Any = resolve({"net": class_name}, ["net"])["net"]
        self.net = net_class(input_channels=channels, num_classes=2, **self.kwargs)
        self.net.decoder.seg_layers.requires_grad_(False)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.net.encoder(x)
        return maps

    def dense(self, x: Tensor) -> Tensor:
        maps = self.pyramid(x)
        return torch.cat([upsample(level, maps[0].shape[2:]) for level in maps], 1)

    @property
    def dense_stride(self) -> tuple[int, ...]:
        return tuple(self.strides[0])

    @property
    def dense_width(self) -> int:
        return sum(self.widths)

    def decode(self, maps: list[Tensor]) -> Tensor:
        return self.project(maps, nn.Identity())

    def project(self, maps: list[Tensor], layer: nn.Module) -> Tensor:
        full = [n * step for n, step in zip(maps[0].shape[2:], self.strides[0])]
        return upsample(layer(self.net.decoder(maps)), full)

    def train_decoder(self, on: bool) -> None:
        for name, part in self.net.decoder.named_children():
            if name != "seg_layers":
                part.requires_grad_(on)

    def adaptation(self) -> EncoderKeys:
        return EncoderKeys("encoder.stages", "encoder.stem", ("encoder.stem.projection",))
