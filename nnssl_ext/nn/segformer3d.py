"""SegFormer3D: a transformer with maps in several resolutions and a decoder of linear layers, for networks of any cell shape.

Shape suffixes: B batch, C channels, N cells of a map in the order of `nn.tokens`, M cells of a reduced map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_ext.nn.cross_attention import Attention

HEAD_WIDTH = 32  # channels per attention head; a narrower stage has one head
EXPANSION = 4  # hidden channels of a feed-forward layer, in widths of its stage
KEYS = 2  # number of the stage on whose grid the keys and values of all finer ones lie


class SegFormer3D(nn.Module):
    """Encoder, decoder and a segmentation layer whose logits are interpolated to the input's resolution.

    No position is embedded: the zeros around a map tell the depthwise convolutions where they are. So any input size will do
    that the product of all strides divides.

    Args:
        input_channels: of the image.
        num_classes: segmentation heads.
        features_per_stage: channels of each stage.
        strides: of each stage's patch embedding, (z, y, x).
        n_blocks_per_stage: transformer blocks.
        decoder_width: channels of the decoder.

    Source: Perera et al. 2024, arXiv:2404.10156; Xie et al. 2021, arXiv:2105.15203. Differs in the decoder's normalisation:
    a LayerNorm, since batches of volumes are small.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        features_per_stage: Sequence[int],
        strides: Sequence[Sequence[int]],
        n_blocks_per_stage: Sequence[int],
        decoder_width: int,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(input_channels, features_per_stage, strides, n_blocks_per_stage)
        self.decoder = Decoder(features_per_stage, decoder_width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes, z, y, x)."""
        return upsample(self.decoder.seg_layers[0](self.decoder(self.encoder(x))), x.shape[2:])


class Encoder(nn.Module):
    """Stages that each halve the resolution (the first one quarters it); on coarse axes less, as `strides` say."""

    def __init__(self, channels: int, widths: Sequence[int], strides: Sequence[Sequence[int]], blocks: Sequence[int]) -> None:
        super().__init__()
        self.stem = PatchEmbedding(channels, widths[0], strides[0])
        embeddings = [nn.Identity(), *(PatchEmbedding(*pair, stride) for pair, stride in zip(pairwise(widths), strides[1:]))]
        self.stages = nn.ModuleList(
            Stage(embedding, width, count, reduction) for embedding, width, count, reduction in zip(embeddings, widths, blocks, reductions(strides))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (B, widths[i], ...) of all stages, finest first."""
        maps = [self.stages[0](self.stem(x))]
        for stage in self.stages[1:]:
            maps.append(stage(maps[-1]))
        return maps


def reductions(strides: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """By how much each stage reduces the grid of its keys and values, (z, y, x): 4, 2, 1, 1 where every later stage halves all axes."""
    return [tuple(math.prod(steps) for steps in zip((1,) * len(stride), *strides[stage + 1 : KEYS + 1])) for stage, stride in enumerate(strides)]


class PatchEmbedding(nn.Module):
    """Convolution over overlapping patches, twice as wide as the stride s (2s - 1 voxels, so 7 for 4 and 3 for 2), and LayerNorm."""

    def __init__(self, channels: int, width: int, stride: Sequence[int]) -> None:
        super().__init__()
        kernel, padding = (tuple(s * factor - 1 for s in stride) for factor in (2, 1))
        self.projection = nn.Conv3d(channels, width, kernel, tuple(stride), padding)  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, ...) to (B, width, .../stride)."""
        embedded = self.projection(x)
        return volume(self.norm(cells(embedded)), embedded.shape[2:])


class Stage(nn.Module):
    """Patch embedding, transformer blocks, LayerNorm."""

    def __init__(self, embedding: nn.Module, width: int, blocks: int, reduction: Sequence[int]) -> None:
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.ModuleList(SegFormerBlock(width, reduction) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """The map of the stage before to that of this one, (B, width, ...)."""
        x = self.embedding(x)
        shape, x_BNC = x.shape[2:], cells(x)
        for block in self.blocks:
            x_BNC = block(x_BNC, shape)
        return volume(self.norm(x_BNC), shape)


class SegFormerBlock(nn.Module):
    """Attention and feed-forward layer, both residual."""

    def __init__(self, width: int, reduction: Sequence[int]) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), EfficientAttention(width, max(1, width // HEAD_WIDTH), reduction)
        self.norm2, self.mlp = nn.LayerNorm(width), MixFFN(width, EXPANSION * width)

    def forward(self, x_BNC: Tensor, shape: Sequence[int]) -> Tensor:
        """Features of cells whose map has `shape` (z, y, x)."""
        x_BNC = x_BNC + self.attention(self.norm1(x_BNC), shape)
        return x_BNC + self.mlp(self.norm2(x_BNC), shape)


class EfficientAttention(Attention):
    """Self-attention of all cells to keys and values on a coarser grid, which a strided convolution makes; plain attention where nothing is reduced.

    Args:
        width: channels C.
        heads: they divide the width.
        reduction: cells per cell of the coarser grid, (z, y, x).
    """

    def __init__(self, width: int, heads: int, reduction: Sequence[int]) -> None:
        super().__init__(width, heads)
        self.reduce: nn.Module | None = None
        if max(reduction) > 1:
            self.reduce, self.norm = nn.Conv3d(width, width, tuple(reduction), tuple(reduction)), nn.LayerNorm(width)  # type: ignore[arg-type]

    def forward(self, x_BNC: Tensor, shape: Sequence[int]) -> Tensor:  # type: ignore[override]
        """(B, N, C) of cells whose map has `shape` (z, y, x)."""
        return super().forward(x_BNC, x_BNC if self.reduce is None else self.norm(cells(self.reduce(volume(x_BNC, shape)))))


class MixFFN(nn.Module):
    """Feed-forward layer with a depthwise convolution of edge 3 in its middle."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.depthwise = nn.Conv3d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x_BNC: Tensor, shape: Sequence[int]) -> Tensor:
        hidden = cells(self.depthwise(volume(self.fc1(x_BNC), shape)))
        return self.fc2(F.gelu(hidden))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """One linear layer per level, all levels interpolated to the finest one, concatenated and fused by another linear layer.

    The fusing layer is applied part by part before the interpolation: as both are linear, the sum is the same, and the wide
    concatenated map is never made.

    Args:
        widths: channels of the levels, finest first.
        width: of the decoder.
        classes: of the segmentation layer, which `SegFormer3D` applies.
        axes: 2 for maps of slices.
    """

    def __init__(self, widths: Sequence[int], width: int, classes: int, axes: int = 3) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(level, width) for level in widths)
        self.fuse, self.norm = nn.Linear(len(widths) * width, width), nn.LayerNorm(width)
        self.seg_layers = nn.ModuleList([{2: nn.Conv2d, 3: nn.Conv3d}[axes](width, classes, 1)])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Dense features (B, width, ...) in the resolution of the first map."""
        shape, parts = maps[0].shape[2:], self.fuse.weight.chunk(len(maps), 1)
        fused = [upsample(volume(F.linear(stage(cells(level)), part), level.shape[2:]), shape) for stage, level, part in zip(self.stages, maps, parts)]
        return volume(F.relu(self.norm(cells(sum(fused[1:], fused[0])) + self.fuse.bias)), shape)


def cells(x: Tensor) -> Tensor:
    """A map (B, C, z, y, x) as (B, N, C)."""
    return x.flatten(2).mT


def volume(x_BNC: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of `cells`."""
    return x_BNC.mT.unflatten(2, tuple(shape))


def upsample(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Trilinear (of slices bilinear), align_corners=False; itself where it has this shape."""
    return x if x.shape[2:] == tuple(shape) else F.interpolate(x, tuple(shape), mode={2: "bilinear", 3: "trilinear"}[len(shape)])
