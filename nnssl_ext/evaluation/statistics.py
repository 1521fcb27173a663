"""What a comparison of two methods on few cases and few seeds can say.

Cases are paired: both methods are judged on the same ones, and the bootstrap draws cases (or whole subjects), not measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.rng import sample_rng

LEVEL = 0.95
RESAMPLES = 10_000
FEWEST_SEEDS = 5  # for an interval over seeds
_BLOCK = 1 << 22  # numbers drawn at once


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval; NaN where too little is known.

    Args:
        mean: the figure itself.
        low, high: ends of the interval.
        count: cases, subjects or seeds it rests on.
    """

    mean: float
    low: float
    high: float
    count: int

    def text(self, signed: bool = False) -> str:
        """Such as "+0.031 [0.012, 0.049]"; "-" where there is no figure."""
        form = "{:+.3f}" if signed else "{:.3f}"
        if math.isnan(self.mean):
            return "-"
        return form.format(self.mean) + ("" if math.isnan(self.low) else f" [{form.format(self.low)}, {form.format(self.high)}]")

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON: null in place of NaN."""
        return {"mean": _known(self.mean), "low": _known(self.low), "high": _known(self.high), "count": self.count}


def bootstrap_mean(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean of cases with its percentile interval (Efron & Tibshirani 1993, chapter 13); NaN are left out, a single case has no interval.

    Args:
        values: of independent cases, in any order: the result is the same bit for bit.
        seed: of the draws.
        resamples: how often as many cases are drawn with replacement.
    """
    known = np.sort(np.asarray(values, float))  # NaN come last
    known = known[: np.isfinite(known).sum()]
    if len(known) < 2:
        return Estimate(float(known.mean()) if len(known) else math.nan, math.nan, math.nan, len(known))
    rng, rows = sample_rng(seed, 0, "bootstrap"), max(1, _BLOCK // len(known))
    means = [known[rng.integers(0, len(known), (min(rows, resamples - first), len(known)))].mean(1) for first in range(0, resamples, rows)]
    return Estimate(float(known.mean()), *percentile_interval(np.concatenate(means)), len(known))


def paired_difference(ours: Mapping[str, float], base: Mapping[str, float], seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean of `ours` - `base` over the cases that have a figure in both, with its interval.

    Args:
        ours, base: figure of each case by name; cases that are NaN in either are left out.

    Raises:
        UserError: no case is common to both.
    """
    common = sorted(set(ours) & set(base))
    if not common:
        raise UserError("the two methods have no case in common", ", ".join([*ours, *base][:4]), "judge both on the same cases")
    return bootstrap_mean([ours[case] - base[case] for case in common], seed, resamples)


def over_seeds(values: Mapping[str, float]) -> Estimate:
    """Mean over seeds; an interval (Student's t) from five seeds on, for fewer the values themselves say more."""
    each = np.array(list(values.values()), float)
    mean = float(each.mean()) if len(each) else math.nan
    if len(each) < FEWEST_SEEDS:
        return Estimate(mean, math.nan, math.nan, len(each))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(each) - 1) * each.std(ddof=1) / math.sqrt(len(each)))
    return Estimate(mean, mean - half, mean + half, len(each))


def seeds_text(values: Mapping[str, float], signed: bool = False) -> str:
    """The mean over seeds, its interval where there is one, and in round brackets the value of every seed."""
    form = "{:+.3f}" if signed else "{:.3f}"
    each = ", ".join(form.format(value) for value in values.values())
    return f"{over_seeds(values).text(signed)} ({each})" if len(values) > 1 else over_seeds(values).text(signed)


def mean_of_seeds(runs: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Figure of each case averaged over the seeds, for `paired_difference`; a case counts where every seed has judged it, NaN where one found none.

    Args:
        runs: figure of each case by seed.

    Raises:
        UserError: no case is common to all seeds.
    """
    common = sorted(set.intersection(*(set(cases) for cases in runs.values()))) if runs else []
    if not common:
        raise UserError("the seeds have no case in common", ", ".join(runs), "judge every seed on the same cases")
    return {case: float(np.mean([cases[case] for cases in runs.values()])) for case in common}


def relative_gain(ours: float, base: float) -> float:
    """(ours - base) / base: 0.05 is 5 % more; NaN for a base of 0."""
    return (ours - base) / base if base else math.nan


def bootstrap_weights(groups: Sequence[str], seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """How often every case is drawn when whole groups are drawn with replacement, (resamples, cases); the order of cases doesn't matter.

    Args:
        groups: subject of each case.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    counts = sample_rng(seed, 0, "bootstrap groups").multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
    return np.asarray(counts[:, member], float)


def weighted_auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray, folds: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve for each row of weights, (resamples,): share of pairs of a positive and a negative case that the scores order, ties half.

    Args:
        scores: of each case, (n,).
        positive: bool (n,).
        weights: how often each case counts, (resamples, n).
        folds: which model gave the score, (n,). Only pairs of one fold are compared: scores of different models have no common scale. None: one model.

    Returns:
        NaN where no pair is left.
    """
    ours, other = np.flatnonzero(positive), np.flatnonzero(~positive)
    ordered = 0.5 + 0.5 * np.sign(scores[ours][:, None] - scores[other])
    pairs = np.ones_like(ordered) if folds is None else (folds[ours][:, None] == folds[other]).astype(float)
    won, all_pairs = (((weights[:, ours] @ table) * weights[:, other]).sum(1) for table in (ordered * pairs, pairs))
    return np.divide(won, all_pairs, out=np.full(len(weights), np.nan), where=all_pairs > 0)


def percentile_interval(draws: np.ndarray) -> tuple[float, float]:
    """Low and high end that hold `LEVEL` of the draws; NaN among them are left out."""
    known = draws[np.isfinite(draws)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
