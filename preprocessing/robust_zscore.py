"""Example of a plug-in: an intensity normalisation that outliers don't disturb."""

from __future__ import annotations

import numpy as np

from nnssl_ext.core.plan import Normalization
from nnssl_ext.preprocessing.normalize import Normalizer


class RobustZScore(Normalizer):
    """Subtract the body's median, divide by its interquartile range in units of a normal distribution's sigma (1.349)."""

    def parameters(self, volume: np.ndarray, body: np.ndarray, plan: Normalization) -> dict[str, float]:
        lower, median, upper = (float(v) for v in np.percentile(volume[body], (25, 50, 75)))
        return {"shift": median, "scale": max((upper - lower) / 1.349, 1e-8)}
