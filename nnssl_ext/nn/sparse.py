"""Residual encoders of dynamic-network-architectures, run on the visible part of a crop under their own parameter names.

Sparse convolutions on the dense grid: wherever a level has nothing visible, the map is zero after every layer, and the moments
of InstanceNorm are those of the active cells. Masks are arguments of every call; no module keeps one.

Shape suffixes: B batch, C channels; a level mask is bool (B, 1, z, y, x), True = active, i.e. the cell holds a visible voxel.

Source: Tian et al. 2023, arXiv:2301.03580.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, StackedResidualBlocks
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU, StackedConvBlocks
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn.precision import wide

FEWEST = 2  # active cells of a sample; the variance of one is zero
_AXES = (2, 3, 4)


def active_levels(hidden: Tensor, strides: Sequence[Sequence[int]]) -> list[Tensor]:
    """Masks of the input and of every level of a pyramid; a cell is active where any of its voxels is visible.

    Args:
        hidden: bool (B, 1, z, y, x), True = hidden.
        strides: voxels per cell of each level, (z, y, x).

    Raises:
        UserError: a sample has fewer than two active cells at the deepest level.
    """
    levels = [~hidden, *(F.max_pool3d((~hidden).float(), tuple(stride)).bool() for stride in strides)]
    if (fewest := int(levels[-1].sum(_AXES).min())) < FEWEST:  # deeper levels have no more active cells than those before
        raise too_few(fewest, strides[-1])
    return levels


def too_few(active: int, stride: Sequence[int]) -> UserError:
    """That a level has too few active cells for InstanceNorm."""
    cell = "x".join(map(str, stride))
    what = f"a sample can have as few as {active} active cell{'s' * (active != 1)} of {cell} voxels; InstanceNorm needs {FEWEST}"
    return UserError(what, "mask and patch_size", "hide less (-o mask_ratio=...), or plan larger patches or fewer stages")


class _MaskedNorm(torch.autograd.Function):
    """Keeps one map of the input's type for the backward pass, as the dense norm does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, active: Tensor, eps: float) -> Tensor:
        count = active.sum(_AXES, keepdim=True)
        centred = torch.where(active, wide(x), 0)
        centred = centred.sub_(centred.sum(_AXES, keepdim=True) / count).masked_fill_(~active, 0)
        scale = (centred.square().sum(_AXES, keepdim=True) / count + eps).rsqrt()
        y = centred.mul_(scale).to(x.dtype)
        ctx.save_for_backward(y, active, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, active, scale = ctx.saved_tensors
        count = active.sum(_AXES, keepdim=True)
        kept, wide_y = torch.where(active, wide(gradient), 0), wide(y)
        mean, along = kept.sum(_AXES, keepdim=True) / count, (kept * wide_y).sum(_AXES, keepdim=True) / count
        return kept.sub_(mean).addcmul_(wide_y, along, value=-1).mul_(scale).masked_fill_(~active, 0).to(gradient.dtype), None, None


def masked_instance_norm(x: Tensor, active: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """InstanceNorm whose moments are those of the active cells of each sample; zero elsewhere, whatever x holds there.

    Args:
        x: (B, C, z, y, x).
        active: level mask; samples may have different numbers of active cells.
        weight, bias: (C,), or both None.
    """
    y: Tensor = _MaskedNorm.apply(x, active, eps)
    if weight is not None and bias is not None:
        y = torch.addcmul(bias.view(-1, 1, 1, 1), y, weight.view(-1, 1, 1, 1))
    return torch.where(active, y, 0).to(x.dtype)


def accept_masks(encoder: nn.Module) -> None:
    """Let stem and stages also be called with level masks, `stage(x, levels)`; without them they compute as ever.

    They are called as modules: what is set on those (sharding, recomputation, compilation) stays in force.
    """
    for part in encoder.modules():
        if isinstance(part, (StackedConvBlocks, StackedResidualBlocks)):
            part.forward = MethodType(_forward, part)  # type: ignore[method-assign]


def encode(encoder: Any, x: Tensor, levels: Sequence[Tensor]) -> list[Tensor]:
    """Maps of every stage, (B, C, z, y, x), zero in inactive cells; hidden voxels have no influence on them.

    Args:
        encoder: a ResidualEncoder after `accept_masks`.
        x: (B, C, z, y, x); what its hidden voxels hold does not matter.
        levels: from `active_levels`.

    Raises:
        UserError: the encoder has a layer that has no sparse form here.
    """
    x = torch.where(levels[0], x, 0)
    if encoder.stem is not None:
        x = encoder.stem(x, levels)
    maps = []
    for stage in encoder.stages:
        x = stage(x, levels)
        maps.append(x)
    return maps


def _forward(self: Any, x: Tensor, levels: Sequence[Tensor] | None = None) -> Tensor:
    """`forward` of a stem or a stage."""
    if levels is None:
        dense: Tensor = type(self).forward(self, x)
        return dense
    for block in self.convs if isinstance(self, StackedConvBlocks) else self.blocks:
        x = _convolution(block, x, levels) if isinstance(block, ConvDropoutNormReLU) else _residual(block, x, levels)
    return x


def _residual(block: Any, x: Tensor, levels: Sequence[Tensor]) -> Tensor:
    if not isinstance(block, BasicBlockD) or block.apply_se:
        raise _unsupported("squeeze and excitation" if isinstance(block, BasicBlockD) else type(block).__name__)
    y = _convolution(block.conv2, _convolution(block.conv1, x, levels), levels)
    if block.apply_stochastic_depth:
        y = block.drop_path(y)
    for layer in block.skip if isinstance(block.skip, nn.Sequential) else ():  # pooling of zeros is zero
        x = _convolution(layer, x, levels) if isinstance(layer, ConvDropoutNormReLU) else layer(x)
    return block.nonlin2(y + x)  # type: ignore[no-any-return]


def _convolution(block: ConvDropoutNormReLU, x: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """Convolution, norm and activation; the mask is the one of the output's size."""
    x = block.conv(x)
    active = next(level for level in levels if level.shape[2:] == x.shape[2:])
    for layer in list(block.all_modules)[1:]:
        if isinstance(layer, nn.InstanceNorm3d) and not layer.track_running_stats:
            x = masked_instance_norm(x, active, layer.weight, layer.bias, layer.eps)
        elif list(layer.buffers()) or list(layer.parameters()):
            raise _unsupported(type(layer).__name__)
        else:
            x = layer(x)
    return x if hasattr(block, "norm") else torch.where(active, x, 0)


def _unsupported(what: str) -> UserError:
    return UserError(f"{what} can't be run on the visible part alone", "network of the plan", "choose another backbone or trainer")


class Densify(nn.Module):
    """Makes a level dense again for a decoder: norm of the active cells, a learned token elsewhere, a convolution.

    Args:
        channels: of the map.
        mixed: whether the convolution follows; the deepest level has none.
    """

    def __init__(self, channels: int, mixed: bool) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm3d(channels, affine=True)
        self.token = nn.Parameter(torch.zeros(1, channels, 1, 1, 1))
        nn.init.normal_(self.token, std=0.02)
        self.mix = nn.Conv3d(channels, channels, 3, padding=1) if mixed else nn.Identity()

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        """Dense map (B, C, z, y, x) of a sparse one and its level mask."""
        x = masked_instance_norm(x, active, self.norm.weight, self.norm.bias, self.norm.eps)
        return self.mix(torch.where(active, x, self.token.to(x.dtype)))  # type: ignore[no-any-return]
