"""A U-Net without skips whose decoder says something at every scale: what it compares, and what it restores."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.projector import BatchNorm, normalized_mlp


class SkiplessDecoder(nn.Module):
    """Decoder that reads the deepest map alone: each scale is a transposed convolution, a convolution, InstanceNorm and LeakyReLU.

    Args:
        backbone: one with a decoder; widths and strides of its levels are those of the scales. Where its finest level is coarser than
            the input, a scale of the same width follows.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        levels = list(zip(backbone.widths, backbone.strides))[::-1]
        levels += [(backbone.widths[0], (1, 1, 1))] * (max(backbone.strides[0]) > 1)
        self.widths = [width for width, _ in levels[1:]]
        self.scales = nn.ModuleList()
        for (deeper, coarse), (width, fine) in pairwise(levels):
            factor = tuple(a // b for a, b in zip(coarse, fine))
            layers = nn.ConvTranspose3d(deeper, width, factor, factor), nn.Conv3d(width, width, 3, padding=1)  # type: ignore[arg-type]
            self.scales.append(nn.Sequential(*layers, nn.InstanceNorm3d(width, affine=True), nn.LeakyReLU()))

    def forward(self, deepest: Tensor) -> list[Tensor]:
        """Maps of all scales of the deepest map of an encoder, coarse to fine."""
        maps = [deepest]
        for scale in self.scales:
            maps.append(scale(maps[-1]))
        return maps[1:]


class Comparison(nn.Module):
    """Projection and prediction of a map's average: the average itself, batch-normalised, and a perceptron with one hidden layer of twice its width.

    Source: Zhou et al. 2023, arXiv:2301.00772.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projector = BatchNorm(width)
        self.predictor = normalized_mlp((width, 2 * width, width), last=False)

    def forward(self, feature: Tensor) -> Tensor:
        """Maps (B, width, z, y, x), moments over whose averages are common, to projections and predictions (2, B, width)."""
        z = self.projector(feature.flatten(2).mean(2))
        return torch.stack((z, self.predictor(z)))


class SkiplessUNet(nn.Module):
    """Encoder of a backbone, and a decoder without skips with a comparison and a restoration at every scale.

    Everything that is restored or compared went through the deepest map.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, SkiplessDecoder(backbone)
        widths = self.decoder.widths
        self.comparisons = nn.ModuleList(Comparison(width) for width in widths)
        self.restorations = nn.ModuleList(nn.Conv3d(width, backbone.channels, 3, padding=1) for width in widths)
        self.last = nn.Conv3d(widths[-1], backbone.channels, 1)

    def forward(self, large: Tensor, small: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Vectors of all crops at every scale, and the first of the large ones restored.

        Args:
            large: (2, B, channels, z, y, x); each of both is normalised among its own kind.
            small: (views, B, channels, z, y, x), normalised together.

        Returns:
            Projections and predictions (2, 2 + views, B, width) of each scale, coarse to fine; the first large crop in the
            resolution of each scale, and once more in that of the last one, (B, channels, ...).
        """
        seen, around = self.maps(large.flatten(0, 1)), self.maps(small.flatten(0, 1))
        vectors = []
        for compare, one, other in zip(self.comparisons, seen, around):
            first, second = (compare(part)[:, None] for part in one.chunk(2))
            vectors.append(torch.cat((first, second, compare(other).unflatten(1, small.shape[:2])), 1))
        firsts = [feature[: large.shape[1]] for feature in seen]
        return vectors, [*(restore(feature) for restore, feature in zip(self.restorations, firsts)), self.last(firsts[-1])]

    def maps(self, crops: Tensor) -> list[Tensor]:
        """Of all scales of the decoder, coarse to fine, for crops (n, channels, z, y, x)."""
        return self.decoder(self.backbone.pyramid(crops)[-1])  # type: ignore[no-any-return]
