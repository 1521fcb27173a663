"""Networks that nnU-Net plans can name in ``architecture.network_class_name``, so that stock trainers build them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, ClassVar

import torch
from dynamic_network_architectures.architectures.primus import Primus, PrimusV2
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import Tensor, nn

from nnssl_ext.finetuning.decoders import AllMLP, UpsamplingAdapter
from nnssl_ext.nn.segformer3d import SegFormer3D, cells, upsample, volume

# nnU-Net derives the scales of deep supervision from arch_kwargs["strides"] (all levels but the last) and gives the
# last scale the weight 0, so that ONE scale makes its loss 0/0. Three unit strides are two scales of full resolution.
FULL_RESOLUTION_STRIDES = ((1, 1, 1), (1, 1, 1), (1, 1, 1))
DEPTHS = 4  # of a transformer, whose features a decoder reads


class Freezable(nn.Module):
    """A network whose named parts are never trained, whatever trainer builds it.

    They get no gradient, so that optimisers neither change them nor keep a state of them, and stay in evaluation mode: nothing is dropped in them.

    Args:
        frozen: names of modules and of single parameters.
        network: arguments of the library's class.
    """

    def __init__(self, *, frozen: Sequence[str] = (), **network: Any) -> None:
        super().__init__(**network)
        self.frozen = tuple(frozen)
        for part in self._frozen_parts():
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> Freezable:
        super().train(mode)
        for part in self._frozen_parts():
            if isinstance(part, nn.Module):
                part.eval()
        return self

    def _frozen_parts(self) -> list[nn.Module | nn.Parameter]:
        parameters = dict(self.named_parameters(recurse=False))
        return [parameters[name] if name in parameters else self.get_submodule(name) for name in self.frozen]


class FullResolution(Freezable):
    """A network with logits of full resolution only, as an nnU-Net plan describes it; its state dict has the library's names.

    The input of a Primus is always `input_shape` large: nnU-Net's sliding window feeds exactly the plan's patch size.

    Args:
        input_channels: image channels.
        num_classes: segmentation heads.
        strides: for nnU-Net only (see `FULL_RESOLUTION_STRIDES`).
        deep_supervision: whether the output is a list with one entry per scale, as nnU-Net's loss expects in training.
        network: all other arguments of the library's class, for a Primus `input_shape` (voxels) and `patch_embed_size` among them, and `frozen`.
    """

    decoder: Any

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        strides: Sequence[Sequence[int]] = FULL_RESOLUTION_STRIDES,
        deep_supervision: bool = False,
        **network: Any,
    ) -> None:
        super().__init__(input_channels=input_channels, num_classes=num_classes, **network)
        self.scales = len(strides) - 1
        if not hasattr(self, "decoder"):
            self.decoder = nn.Module()
        self.decoder.deep_supervision = deep_supervision  # where nnU-Net sets it

    def forward(self, x: Tensor, *options: Any) -> Any:
        """Logits (B, num_classes, z, y, x); with deep supervision the same logits once per scale."""
        logits = super().forward(x, *options)
        return [logits] * self.scales if self.decoder.deep_supervision else logits


class PlannedPrimus(FullResolution, Primus):
    """Primus for nnU-Net plans."""


class PlannedPrimusV2(FullResolution, PrimusV2):
    """Primus V2 for nnU-Net plans."""


class FrozenResidualEncoderUNet(Freezable, ResidualEncoderUNet):
    """A U-Net of which a part can be frozen."""

    def __init__(self, input_channels: int, num_classes: int, **network: Any) -> None:
        super().__init__(input_channels=input_channels, num_classes=num_classes, **network)


class _LinearTokens(nn.Module):
    """A Primus whose tokens become logits by one linear map, which are upsampled (trilinear) to the voxels."""

    def __init__(self, *, num_classes: int, embed_dim: int, patch_embed_size: Sequence[int], **primus: Any) -> None:
        super().__init__(num_classes=num_classes, embed_dim=embed_dim, patch_embed_size=patch_embed_size, **primus)
        to_voxels = nn.Upsample(scale_factor=tuple(float(size) for size in patch_embed_size), mode="trilinear")
        self.up_projection = nn.Sequential(nn.Conv3d(embed_dim, num_classes, 1), to_voxels)


class LinearPrimus(FullResolution, _LinearTokens, Primus):
    """Linear probe of a Primus."""


class LinearPrimusV2(FullResolution, _LinearTokens, PrimusV2):
    """Linear probe of a Primus V2."""


class _OwnStrides(nn.Module):
    """A network with strided stages.

    Args:
        encoder_strides: those of its stages, since the plan's `strides` belong to nnU-Net.
        network: other arguments of the library's class.
    """

    def __init__(self, *, encoder_strides: Sequence[Sequence[int]], **network: Any) -> None:
        super().__init__(strides=encoder_strides, **network)


class _EncoderAlone(_OwnStrides):
    """The encoder of a network of several resolutions in the place of the whole."""

    encoder: Any

    def __init__(self, *, features_per_stage: Sequence[int], **network: Any) -> None:
        super().__init__(features_per_stage=features_per_stage, **network)
        del self.decoder


class _LinearPyramid(_EncoderAlone):
    """Every level becomes logits by one linear map, which are upsampled to the voxels and summed."""

    def __init__(self, *, num_classes: int, features_per_stage: Sequence[int], **network: Any) -> None:
        super().__init__(num_classes=num_classes, features_per_stage=features_per_stage, **network)
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[len(network["encoder_strides"][0])]
        self.linear = nn.ModuleList(conv(width, num_classes, 1, bias=level == 0) for level, width in enumerate(features_per_stage))

    def forward(self, x: Tensor) -> Tensor:
        logits = (layer(level) for layer, level in zip(self.linear, self.encoder(x), strict=True))
        return reduce(torch.add, (upsample(level, x.shape[2:]) for level in logits))


class LinearResidualEncoderUNet(FullResolution, _LinearPyramid, ResidualEncoderUNet):
    """Linear probe of a residual encoder."""


class PlannedSegFormer3D(FullResolution, _OwnStrides, SegFormer3D):
    """SegFormer3D for nnU-Net plans."""


class LinearSegFormer3D(FullResolution, _LinearPyramid, SegFormer3D):
    """Linear probe of a SegFormer3D's encoder."""


class _Decoded(nn.Module):
    """A network that decodes the maps of its encoder; logits are interpolated where the decoder's map is coarser than the image."""

    decoder: Any

    def maps(self, x: Tensor) -> list[Tensor]:
        """Features (B, C, ...) of an image, finest first."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return upsample(self.decoder.seg_layers[0](self.decoder(self.maps(x))), x.shape[2:])


class _Depths(_Decoded):
    """A Primus whose decoder reads the tokens behind several of its blocks, each normalised by the last norm.

    Source: Ranftl et al. 2021, arXiv:2103.13413 (four depths, evenly spaced); Oquab et al. 2023, arXiv:2304.07193 (the last norm for all).
    """

    decoder_class: ClassVar[type[UpsamplingAdapter | AllMLP]]
    down_projection: Any
    eva: Any
    register_tokens: Tensor | None

    def __init__(self, *, num_classes: int, embed_dim: int, patch_embed_size: Sequence[int], **primus: Any) -> None:
        super().__init__(num_classes=num_classes, embed_dim=embed_dim, patch_embed_size=patch_embed_size, **primus)
        del self.up_projection
        blocks = len(self.eva.blocks)
        self.depths = sorted({math.ceil(blocks * quarter / DEPTHS) for quarter in range(1, DEPTHS + 1)})
        self.decoder = self.decoder_class([embed_dim] * len(self.depths), patch_embed_size, num_classes)

    def maps(self, x: Tensor) -> list[Tensor]:
        embedded = self.down_projection(x)
        tokens, maps, shape = cells(embedded), [], embedded.shape[2:]
        if self.register_tokens is not None:
            tokens = torch.cat((self.register_tokens.expand(len(x), -1, -1), tokens), 1)
        tokens, rotary, _ = self.eva._pos_embed(tokens)
        for depth, block in enumerate(self.eva.blocks, 1):
            tokens = block(tokens, rope=rotary)
            if depth in self.depths:
                maps.append(volume(self.eva.norm(tokens)[:, -math.prod(shape) :], shape))
        return maps


class AdapterPrimus(FullResolution, _Depths, Primus):
    """Upsampling layers on the tokens of a Primus."""

    decoder_class = UpsamplingAdapter


class AdapterPrimusV2(FullResolution, _Depths, PrimusV2):
    """Upsampling layers on the tokens of a Primus V2."""

    decoder_class = UpsamplingAdapter


class MLPPrimus(FullResolution, _Depths, Primus):
    """All-MLP decoder on the tokens of a Primus."""

    decoder_class = AllMLP


class MLPPrimusV2(FullResolution, _Depths, PrimusV2):
    """All-MLP decoder on the tokens of a Primus V2."""

    decoder_class = AllMLP


class _MLPPyramid(_Decoded, _EncoderAlone):
    """All-MLP decoder of the levels of an encoder."""

    def __init__(self, *, num_classes: int, features_per_stage: Sequence[int], encoder_strides: Sequence[Sequence[int]], **network: Any) -> None:
        super().__init__(num_classes=num_classes, features_per_stage=features_per_stage, encoder_strides=encoder_strides, **network)
        self.decoder = AllMLP(features_per_stage, encoder_strides[0], num_classes)

    def maps(self, x: Tensor) -> list[Tensor]:
        return self.encoder(x)  # type: ignore[no-any-return]


class MLPResidualEncoderUNet(FullResolution, _MLPPyramid, ResidualEncoderUNet):
    """All-MLP decoder on a residual encoder."""


# by the names of the library's classes: what a plan names in their place
PLANNED: dict[str, type[Freezable]] = {"Primus": PlannedPrimus, "PrimusV2": PlannedPrimusV2, "SegFormer3D": PlannedSegFormer3D}
FROZEN: dict[str, type[Freezable]] = {**PLANNED, "ResidualEncoderUNet": FrozenResidualEncoderUNet}
LINEAR: dict[str, type[Freezable]] = {
    "Primus": LinearPrimus,
    "PrimusV2": LinearPrimusV2,
    "ResidualEncoderUNet": LinearResidualEncoderUNet,
    "SegFormer3D": LinearSegFormer3D,
}
ADAPTER: dict[str, type[Freezable]] = {"Primus": AdapterPrimus, "PrimusV2": AdapterPrimusV2}
MLP: dict[str, type[Freezable]] = {
    "Primus": MLPPrimus,
    "PrimusV2": MLPPrimusV2,
    "ResidualEncoderUNet": MLPResidualEncoderUNet,
    "SegFormer3D": PlannedSegFormer3D,  # its own decoder is one
}
