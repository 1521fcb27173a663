"""Intensity normalisation: pure functions of a channel, its body and the plan's statistics."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnssl_ext.core.plan import Normalization
from nnssl_ext.core.registry import find_class

_SMALLEST = 1e-8


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
        """(clip(volume, low, high) - shift) / scale, float32."""
        clipped = np.clip(volume, parameters.get("low", -np.inf), parameters.get("high", np.inf))
        return ((clipped - np.float32(parameters["shift"])) / np.float32(parameters["scale"])).astype(np.float32, copy=False)

    @staticmethod
    def invert(volume: np.ndarray, parameters: dict[str, float]) -> np.ndarray:
        """The intensities before `apply`, up to the clipping."""
        return volume * np.float32(parameters["scale"]) + np.float32(parameters["shift"])


class CT(Normalizer):
    """Clip to the collection's 0.5 and 99.5 percentiles, z-score with its mean and standard deviation (as nnU-Net)."""

    def parameters(self, volume: np.ndarray, body: np.ndarray, plan: Normalization) -> dict[str, float]:
        return {"low": plan.low, "high": plan.high, "shift": plan.mean, "scale": max(plan.std, _SMALLEST)}


class ZScore(Normalizer):
    """Zero mean and unit standard deviation in the case's body."""

    def parameters(self, volume: np.ndarray, body: np.ndarray, plan: Normalization) -> dict[str, float]:
        inside = volume[body].astype(np.float64)
        return {"shift": float(inside.mean()), "scale": max(float(inside.std()), _SMALLEST)}


class Percentile(Normalizer):
    """The 0.5 - 99.5 percentiles of the case's body to [0, 1], clipped."""

    def parameters(self, volume: np.ndarray, body: np.ndarray, plan: Normalization) -> dict[str, float]:
        low, high = (float(v) for v in np.percentile(volume[body], (0.5, 99.5)))
        return {"low": low, "high": high, "shift": low, "scale": max(high - low, _SMALLEST)}


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
