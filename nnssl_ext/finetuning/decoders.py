"""Segmentation decoders for frozen features: upsampling layers for the tokens of a transformer, and linear layers for maps of any backbone."""

from __future__ import annotations

from collections.abc import Sequence

from dynamic_network_architectures.building_blocks.patch_encode_decode import LayerNormNd
from torch import Tensor, cat, nn

from nnssl_ext.nn.segformer3d import Decoder

FINEST, WIDEST = 32, 256  # channels


def width_at(cell: Sequence[int]) -> int:
    """Channels of a decoder's map whose cells have `cell` voxels: 32 at full resolution, twice as many with every halving, at most 256."""
    return min(WIDEST, FINEST * max(cell))


class UpsamplingAdapter(nn.Module):
    """Maps of one resolution side by side, projected, then doubled by transposed convolutions up to the voxels; LayerNorm and GELU after each layer.

    Kernels are as wide as their strides: what a voxel is depends on its own token alone, whose features know the surroundings. Cells that are no
    cubes become cubes first.

    Args:
        widths: channels of the maps.
        cell: voxels of a token, (z, y, x), powers of two.
        classes: of the segmentation layer, which the network applies.
    """

    def __init__(self, widths: Sequence[int], cell: Sequence[int], classes: int) -> None:
        super().__init__()
        layers = [_layer(nn.Conv3d(sum(widths), width_at(cell), 1))]
        while max(cell) > 1:
            stride = tuple(2 if edge == max(cell) else 1 for edge in cell)
            finer = tuple(edge // step for edge, step in zip(cell, stride, strict=True))
            layers.append(_layer(nn.ConvTranspose3d(width_at(cell), width_at(finer), stride, stride)))  # type: ignore[arg-type]
            cell = finer
        self.layers = nn.Sequential(*layers)
        self.seg_layers = nn.ModuleList([nn.Conv3d(width_at(cell), classes, 1)])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Dense features (B, 32, z, y, x) in the resolution of the image."""
        return self.layers(cat(tuple(maps), 1))  # type: ignore[no-any-return]


class AllMLP(Decoder):
    """SegFormer's decoder: a linear layer per map, interpolated to the finest one, concatenated and fused by another linear layer.

    Args:
        widths: channels of the maps, finest first.
        cell: voxels of a cell of the finest one.
        classes: of the segmentation layer, which the network applies.

    Source: Xie et al. 2021, arXiv:2105.15203.
    """

    def __init__(self, widths: Sequence[int], cell: Sequence[int], classes: int) -> None:
        super().__init__(widths, width_at(cell), classes, axes=len(cell))


def _layer(convolution: nn.Conv3d | nn.ConvTranspose3d) -> nn.Sequential:
    return nn.Sequential(convolution, LayerNormNd(convolution.out_channels), nn.GELU())
