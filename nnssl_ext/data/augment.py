"""Intensity augmentation: drawn as plain numbers for each sample, applied in the loader or on the device.

A drawn step is (operation, channel, numbers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from torch import Tensor

from nnssl_ext.data import intensity_cpu, intensity_device

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

DINO = Intensity(
    noise=Chance(0.3, 0.0, 0.15),
    blur=Chance(0.4, 0.5, 1.0),
    brightness=Chance(0.3, 0.8, 1.25),
    contrast=Chance(0.3, 0.8, 1.25),
    low_resolution=Chance(0.25, 0.5, 1.0),
    gamma_inverted=Chance(0.15, 0.7, 1.5),
    gamma=Chance(0.4, 0.7, 1.5),
)  # for views of self-distillation, large and small ones alike: about as strong as nnU-Net's, but hardly a view goes without


def apply(image: Tensor, steps: Sequence[Step]) -> None:
    """Change an image (C, z, y, x) by the drawn steps, in place: compiled on a CPU, by torch elsewhere; both agree up to rounding."""
    for name, channel, numbers in steps:
        if image.device.type == "cpu":
            intensity_cpu.OPERATIONS[name](image[channel].numpy(), *numbers)
        else:
            intensity_device.OPERATIONS[name](image[channel], *numbers)
