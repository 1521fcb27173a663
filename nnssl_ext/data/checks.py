"""What a method can find out about its data before it trains for days."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Box
from nnssl_ext.preprocessing.store import CaseStore

LARGEST = 15.0  # a percentile of 0.5 % lies within 14.1 standard deviations of the mean, whatever the distribution (Cantelli)
_CASES, _EDGE = 8, 64  # that are looked at: cases, voxels of the box in their middle
_FIX = "give the modality a normalisation ('zscore' or 'ct' in the plan, no 'noNorm' in the dataset), then preprocess again"


def check_normalized(store: CaseStore, cases: Sequence[int]) -> None:
    """Look at the middle of a few cases, spread over all: z-scores (also clipped ones with heavy tails) and values scaled to [0, 1] pass.

    Args:
        cases: indices into the store.

    Raises:
        UserError: a channel has values that are not finite, or mean magnitude or standard deviation above 15, as Hounsfield
            units, 0 to 255 and raw MR have.
    """
    for case in cases[:: max(1, math.ceil(len(cases) / _CASES))]:
        for number, channel in enumerate(store.read(case, _middle(store.shape(case)))):
            where = f"{store.identifiers[case]}, channel {number}"
            if not np.isfinite(channel).all():
                raise UserError("a preprocessed case holds values that are not finite", where, "check it with nnssl_verify, then preprocess it again")
            size, spread = float(np.abs(channel).mean(dtype=np.float64)), float(channel.std(dtype=np.float64))
            if max(size, spread) > LARGEST:
                raise UserError(f"the values are not normalised: mean magnitude {size:.4g}, standard deviation {spread:.4g}", where, _FIX)


def _middle(shape: Sequence[int]) -> Box:
    return tuple(((n - edge) // 2, (n + edge) // 2) for n, edge in ((n, min(n, _EDGE)) for n in shape))


def distinct_crops(store: CaseStore, cases: Sequence[int], patch_size: Sequence[int]) -> float:
    """Voxels of all cases over those of a patch: how many crops there are that don't overlap."""
    return sum(math.prod(store.shape(case)) for case in cases) / math.prod(patch_size)
