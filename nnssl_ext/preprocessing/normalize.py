"""Intensity normalisation: pure functions of a channel, its body and the plan's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nnssl_ext.core.plan import Normalization
from nnssl_ext.core.registry import find_class

_RESOLUTION = 1e-7  # float32 can't tell values apart that differ by less, relative to their size
_SMALLEST, _LARGEST = 1e-30, 3e38  # divisor and quotient, within the range of float32
_SAMPLE = 1 << 20  # voxels that percentiles are taken of
_CHUNK = 1 << 18  # voxels worked on at once, so that they stay in the processor's cache


class Normalizer:
    """One scheme; subclass it in a plug-in folder and name the class in the plan to use your own.

    A scheme is an affine map after clipping, so that it can be undone but for the clipping.
    """

    def parameters(self, volume: np.ndarray, body: np.ndarray, plan: Normalization) -> dict[str, float]:
        """Numbers that `apply` needs: "low" and "high" to clip to, "shift" and "scale".

        Args:
            volume: (z, y, x) float32.
            body: bool (z, y, x).
            plan: the plan's entry for the modality.
        """
        raise NotImplementedError

    @staticmethod
    def apply(volume: np.ndarray, parameters: dict[str, float]) -> np.ndarray:
        """(clip(volume, low, high) - shift) / scale, float32; finite for finite voxels, whose quotients are kept within +-3e38."""
        low, high = (np.float32(np.clip(parameters.get(key, value), -_LARGEST, _LARGEST)) for key, value in (("low", -_LARGEST), ("high", _LARGEST)))
        shift, scale = np.float32(parameters["shift"]), np.float32(min(parameters["scale"], _LARGEST))
        result = np.empty(volume.shape, np.float32)
        with np.errstate(over="ignore"):
            for old, new in zip(volume, result):  # plane by plane, so that they stay in the processor's cache
                np.clip(old.astype(np.float32, copy=False), low, high, out=new)
                new -= shift
                new /= scale
                np.clip(new, -_LARGEST, _LARGEST, out=new)
        return result

    @staticmethod
    def invert(volume: np.ndarray, parameters: dict[str, float]) -> np.ndarray:
        """The intensities before `apply`, up to the clipping."""
        return volume * np.float32(parameters["scale"]) + np.float32(parameters["shift"])


class CT(Normalizer):
    """Clip to the collection's 0.5 and 99.5 percentiles, z-score with its mean and standard deviation (as nnU-Net)."""

    def parameters(self, volume: np.ndarray, body: np.ndarray, plan: Normalization) -> dict[str, float]:
        return {"low": plan.low, "high": plan.high, "shift": plan.mean, "scale": divisor(plan.std, plan.mean)}


class ZScore(Normalizer):
    """Zero mean and unit standard deviation in the case's body."""

    def parameters(self, volume: np.ndarray, body: np.ndarray, plan: Normalization) -> dict[str, float]:
        inside = _inside(volume, body)
        mean = float(inside.mean(dtype=np.float64))
        chunks = (inside[first : first + _CHUNK].astype(np.float64) - mean for first in range(0, len(inside), _CHUNK))
        return {"shift": mean, "scale": divisor(float(np.sqrt(sum(float(chunk @ chunk) for chunk in chunks) / len(inside))), mean)}


class Percentile(Normalizer):
    """The 0.5 - 99.5 percentiles of the case's body to [0, 1], clipped."""

    def parameters(self, volume: np.ndarray, body: np.ndarray, plan: Normalization) -> dict[str, float]:
        low, high = percentiles(_inside(volume, body), (0.5, 99.5))
        return {"low": low, "high": high, "shift": low, "scale": divisor(high - low, max(abs(low), abs(high)))}


class NoNormalization(Normalizer):
    """Intensities as they are."""

    def parameters(self, volume: np.ndarray, body: np.ndarray, plan: Normalization) -> dict[str, float]:
        return {"shift": 0.0, "scale": 1.0}


SCHEMES: dict[str, type[Normalizer]] = {"ct": CT, "zscore": ZScore, "percentile": Percentile, "none": NoNormalization}


def find_normalizer(scheme: str) -> Normalizer:
    """A scheme by the name a plan gives it: built in, or a plug-in's class name.

    Raises:
        UserError: no such scheme.
    """
    found: Any = SCHEMES.get(scheme) or find_class(scheme, Normalizer, "nnssl_ext.preprocessing")
    normalizer: Normalizer = found()
    return normalizer


def divisor(spread: float, size: float) -> float:
    """A spread of intensities to divide by; 1 where it is none beyond the rounding of values of this size."""
    return spread if spread > max(_RESOLUTION * abs(size), _SMALLEST) else 1.0


def percentiles(values: np.ndarray, ranks: Sequence[float]) -> list[float]:
    """Percentiles of every n-th value, n the smallest that leaves at most a million: a rank of 0.5 is met to 0.01 (standard deviation)."""
    flat = values.reshape(-1)
    found = np.percentile(flat[:: max(1, -(-len(flat) // _SAMPLE))], ranks)
    return [float(value) for value in found]


def _inside(volume: np.ndarray, body: np.ndarray) -> np.ndarray:
    """The body's voxels, (n,); all voxels where there is none."""
    inside = volume[body]
    return inside if len(inside) else volume.reshape(-1)
