"""The intensity operations in torch, for volumes (z, y, x) on a GPU: in place, and up to rounding those of `intensity_cpu`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nnssl_ext.data.intensity_cpu import GOLDEN, MIX_1, MIX_2, coarse_grid, gaussian


def noise(x: Tensor, std: float, seed: int) -> None:
    """Add Gaussian noise."""
    half = (x.numel() + 1) // 2
    state = torch.arange(1, half + 1, device=x.device) * _signed(GOLDEN) + _signed(seed)  # SplitMix64; 64-bit integers wrap around
    state = (state ^ _shifted(state, 30)) * _signed(MIX_1)
    state = (state ^ _shifted(state, 27)) * _signed(MIX_2)
    state = state ^ _shifted(state, 31)
    uniform = (_shifted(state, 40) + 1).float() * 2**-24
    angle = ((state & 0xFFFFFF) - 2**23).float() * (math.pi * 2**-24)
    radius = std * uniform.log().mul_(-2).sqrt_() * (1 - 2 * (_shifted(state, 24) & 1))
    x += torch.cat((radius * angle.cos(), radius * angle.sin()))[: x.numel()].view(x.shape)


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def _shifted(state: Tensor, bits: int) -> Tensor:
    return (state >> bits) & (2 ** (64 - bits) - 1)


def blur(x: Tensor, *sigmas: float) -> None:
    """Gaussian blur."""
    for axis, sigma in enumerate(sigmas):
        last, place = x.shape[axis] - 1, torch.arange(x.shape[axis], device=x.device)
        center, *weights = gaussian(sigma, x.shape[axis]).tolist()
        total = center * x
        for k, weight in enumerate(weights, 1):
            total += weight * (x.index_select(axis, (place - k).abs()) + x.index_select(axis, last - (last - place - k).abs()))
        x.copy_(total)


def brightness(x: Tensor, factor: float) -> None:
    """Multiply."""
    x *= factor


def contrast(x: Tensor, factor: float) -> None:
    """Stretch about the mean, within the range of before."""
    mean, (low, high) = x.mean(), x.aminmax()
    x.sub_(mean).mul_(factor).add_(mean).clamp_(low, high)


def low_resolution(x: Tensor, share: float) -> None:
    """Fewer voxels and back."""
    small = x
    for axis, size in enumerate(x.shape):
        kept, before, after, part = (torch.from_numpy(values).to(x.device) for values in coarse_grid(size, share))
        part = part.view([-1 if axis == other else 1 for other in range(3)])
        small = small.index_select(axis, kept[before]).lerp(small.index_select(axis, kept[after]), part)
    x.copy_(small)


def gamma(x: Tensor, exponent: float, sign: float = 1.0) -> None:
    """Raise to a power."""
    mean, std, (low, high) = x.mean(), x.std(correction=0), x.aminmax()
    x.sub_(low if sign > 0 else high).mul_(sign / (high - low).clamp(min=1e-7)).pow_(exponent)
    factor = sign * std / x.std(correction=0).clamp(min=1e-7)
    x.sub_(x.mean()).mul_(factor).add_(mean)


def gamma_inverted(x: Tensor, exponent: float) -> None:
    """`gamma` of the inverted volume, inverted back."""
    gamma(x, exponent, -1.0)


OPERATIONS: dict[str, Callable[..., None]] = {f.__name__: f for f in (noise, blur, brightness, contrast, low_resolution, gamma, gamma_inverted)}
