"""Intensity augmentation: drawn as plain numbers for each sample, applied in the loader or on the device.

A drawn step is (operation, channel, numbers); what it does is one of the small functions below, each from a volume
(z, y, x) to a new one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

Step = tuple[str, int, tuple[float, ...]]


@dataclass(frozen=True)
class Chance:
    """How often and how strongly an operation is applied.

    Args:
        p: probability that a sample gets it at all.
        low, high: range of its strength.
        channels: probability of each channel of such a sample.
    """

    p: float = 0.0
    low: float = 1.0
    high: float = 1.0
    channels: float = 1.0


@dataclass(frozen=True)
class Intensity:
    """Random intensity operations, in this order.

    Args:
        noise: standard deviation of added Gaussian noise; the same for all channels.
        blur: standard deviation of the Gaussian in voxels; one for each axis.
        brightness: factor.
        contrast: factor about the mean, clipped to the range of before.
        low_resolution: share of the voxels kept along each axis.
        gamma_inverted: exponent, on the inverted volume; mean and standard deviation stay.
        gamma: exponent; mean and standard deviation stay.

    Factors and exponents are below 1 in half of the cases where their range has both sides.
    """

    noise: Chance = Chance()
    blur: Chance = Chance()
    brightness: Chance = Chance()
    contrast: Chance = Chance()
    low_resolution: Chance = Chance()
    gamma_inverted: Chance = Chance()
    gamma: Chance = Chance()

    def draw(self, channels: int, rng: np.random.Generator) -> tuple[Step, ...]:
        """The steps for one sample; a pure function of the generator's state."""
        steps: list[Step] = []
        for name in (field.name for field in fields(self)):
            chance: Chance = getattr(self, name)
            if not chance.p or rng.random() >= chance.p:
                continue
            shared = rng.uniform(chance.low, chance.high)
            for channel in range(channels):
                if rng.random() < chance.channels:
                    steps.append((name, channel, _numbers(name, chance, shared, rng)))
        return tuple(steps)


def _numbers(name: str, chance: Chance, shared: float, rng: np.random.Generator) -> tuple[float, ...]:
    if name == "noise":
        return (shared, int(rng.integers(0, 2**63 - 1)))
    if name == "blur":
        return tuple(rng.uniform(chance.low, chance.high, 3).tolist())
    if name == "low_resolution" or not chance.low < 1 < chance.high:
        return (float(rng.uniform(chance.low, chance.high)),)
    below = rng.random() < 0.5
    return (float(rng.uniform(chance.low, 1) if below else rng.uniform(1, chance.high)),)


NNUNET = Intensity(
    noise=Chance(0.1, 0.0, 0.1),
    blur=Chance(0.2, 0.5, 1.0, channels=0.5),
    brightness=Chance(0.15, 0.75, 1.25),
    contrast=Chance(0.15, 0.75, 1.25),
    low_resolution=Chance(0.25, 0.5, 1.0, channels=0.5),
    gamma_inverted=Chance(0.1, 0.7, 1.5),
    gamma=Chance(0.3, 0.7, 1.5),
)  # Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, with the probabilities of nnunetv2's trainer


def apply(image: Tensor, steps: Sequence[Step]) -> Tensor:
    """A new (C, z, y, x) with the drawn steps applied; without steps the image itself.

    On a CPU the result doesn't depend on the number of threads.
    """
    if not steps:
        return image
    image = image.clone()
    for name, channel, numbers in steps:
        image[channel] = OPERATIONS[name](image[channel], *numbers)
    return image


def noise(x: Tensor, std: float, seed: int) -> Tensor:
    """Add Gaussian noise of a generator with this seed; the numbers differ between kinds of device."""
    return x + std * torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(seed), device=x.device)


def blur(x: Tensor, *sigmas: float) -> Tensor:
    """Gaussian blur with a standard deviation (voxels) for each axis, cut at four of them, mirrored at the edges."""
    return _along_axes(x, [_blur_matrix(size, sigma) for size, sigma in zip(x.shape, sigmas)])


def _blur_matrix(size: int, sigma: float) -> np.ndarray:
    reach = min(math.ceil(4 * sigma), size - 1)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    source = np.abs(np.arange(size)[:, None] + offsets)
    source = np.where(source < size, source, 2 * (size - 1) - source)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], source), weights / weights.sum())
    return matrix


def brightness(x: Tensor, factor: float) -> Tensor:
    """Multiply."""
    return x * factor


def contrast(x: Tensor, factor: float) -> Tensor:
    """Stretch about the mean, within the range of before."""
    mean = _mean(x)
    low, high = x.aminmax()
    return ((x - mean) * factor).add_(mean).clamp_(low, high)


def low_resolution(x: Tensor, share: float) -> Tensor:
    """Keep the nearest of `share` of the voxels along each axis and interpolate linearly between them."""
    return _along_axes(x, [_low_resolution_matrix(size, max(1, round(size * share))) for size in x.shape])


def _low_resolution_matrix(size: int, kept: int) -> np.ndarray:
    nearest = ((np.arange(kept) + 0.5) * size / kept).astype(int)
    place = ((np.arange(size) + 0.5) * kept / size - 0.5).clip(0, kept - 1)
    first = place.astype(int)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size), nearest[first]), 1 - place + first)
    np.add.at(matrix, (np.arange(size), nearest[np.minimum(first + 1, kept - 1)]), place - first)
    return matrix


def _along_axes(x: Tensor, matrices: Sequence[np.ndarray]) -> Tensor:
    """A linear map of each axis, one after the other: the matrix product is the fastest way on a CPU and on a GPU."""
    z, y, last = (torch.from_numpy(matrix.astype(np.float32)).to(x.device) for matrix in matrices)
    x = (z @ x.reshape(len(x), -1)).view(x.shape)
    return torch.matmul(torch.matmul(y, x), last.T)


def gamma(x: Tensor, exponent: float, sign: float = 1.0) -> Tensor:
    """Raise the volume, scaled to [0, 1], to a power; scale back to its mean and standard deviation."""
    low, high = (x * sign).aminmax()
    curved = ((x * sign - low) / (high - low).clamp(min=1e-7)).pow_(exponent)
    mean, std = _mean(x), _std(x)
    factor = sign * std / _std(curved).clamp(min=1e-7)
    return curved.sub_(_mean(curved)).mul_(factor).add_(mean)


def gamma_inverted(x: Tensor, exponent: float) -> Tensor:
    """`gamma` of the inverted volume, inverted back."""
    return gamma(x, exponent, -1.0)


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1).mean()  # by planes, so that the sum doesn't depend on the number of threads


def _std(x: Tensor) -> Tensor:
    return _mean((x - _mean(x)).square_()).sqrt()


OPERATIONS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (noise, blur, brightness, contrast, low_resolution, gamma, gamma_inverted)}
