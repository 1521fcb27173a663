"""The bootstrap covers what it promises; degenerate cases are known; AUC equals scikit-learn's."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from nnssl_ext.core.errors import UserError
from nnssl_ext.evaluation.statistics import (
    Estimate,
    bootstrap_mean,
    bootstrap_weights,
    mean_of_seeds,
    over_seeds,
    paired_difference,
    percentile_interval,
    relative_gain,
    seeds_text,
    weighted_auc,
)

RNG = np.random.default_rng(0)


def cases(values):
    return {f"case{i}": float(value) for i, value in enumerate(values)}


def test_intervals_of_gaussian_differences_hold_the_truth_in_about_95_of_100_cases():
    held, widths = [], []
    for repetition in range(400):
        base, noise = RNG.normal(0.6, 0.2, 40), RNG.normal(0.03, 0.05, 40)
        found = paired_difference(cases(base + noise), cases(base), repetition, 1000)
        held.append(found.low <= 0.03 <= found.high)
        widths.append(found.high - found.low)
    assert 0.91 <= np.mean(held) <= 0.98
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.05 / math.sqrt(40), rel=0.1)  # the spread of the cases themselves cancels


def test_the_interval_equals_a_plain_bootstrap_up_to_its_own_randomness():
    values = RNG.gamma(2.0, size=25)
    means = [np.mean([values[RNG.integers(25)] for _ in range(25)]) for _ in range(4000)]
    found = bootstrap_mean(values)
    assert found.mean == pytest.approx(values.mean()) and found.count == 25
    np.testing.assert_allclose((found.low, found.high), np.quantile(means, (0.025, 0.975)), atol=0.04)


def test_identical_methods_differ_by_exactly_nothing():
    values = cases(RNG.random(9))
    assert paired_difference(values, values) == Estimate(0.0, 0.0, 0.0, 9)


def test_a_constant_shift_is_found_exactly():
    values = RNG.random(9)
    found = paired_difference(cases(values + 0.25), cases(values))
    np.testing.assert_allclose((found.mean, found.low, found.high), 0.25, rtol=1e-12)


def test_neither_the_order_of_the_cases_nor_the_size_of_a_block_matters(monkeypatch):
    ours, base = cases(RNG.random(20)), cases(RNG.random(20))
    found = paired_difference(ours, base)
    mixed = dict(reversed(ours.items()))
    assert paired_difference(mixed, base) == found != paired_difference(ours, base, seed=1)
    assert paired_difference(base, ours).mean == pytest.approx(-found.mean)
    monkeypatch.setattr("nnssl_ext.evaluation.statistics._BLOCK", 77)
    assert paired_difference(ours, base) == found


def test_cases_without_a_figure_in_either_are_left_out():
    ours, base = {"a": 1.0, "b": math.nan, "c": 3.0, "d": 9.0}, {"a": 0.5, "b": 1.0, "c": 2.0, "e": 9.0}
    found = paired_difference(ours, base)
    assert (found.mean, found.count) == (0.75, 2) and (found.low, found.high) == (0.5, 1.0)


def test_one_case_has_no_interval_and_none_no_figure():
    one, none = paired_difference({"a": 1.0}, {"a": 0.5}), bootstrap_mean([math.nan])
    assert (one.mean, one.count, one.text(signed=True)) == (0.5, 1, "+0.500") and math.isnan(one.low)
    assert (none.count, none.text()) == (0, "-") and none.as_dict() == {"mean": None, "low": None, "high": None, "count": 0}


def test_no_common_case_is_an_error():
    with pytest.raises(UserError, match="no case in common"):
        paired_difference({"a": 1.0}, {"b": 1.0})
    with pytest.raises(UserError, match="seeds have no case in common"):
        mean_of_seeds({"0": {"a": 1.0}, "1": {"b": 1.0}})


def test_an_interval_over_seeds_is_given_from_five_on():
    values = {str(seed): float(value) for seed, value in enumerate(RNG.normal(size=5))}
    found, four = over_seeds(values), over_seeds({seed: values[seed] for seed in "0123"})
    expected = stats.ttest_1samp(list(values.values()), 0).confidence_interval()
    np.testing.assert_allclose((found.low, found.high), expected)
    assert math.isnan(four.low) and four.mean == pytest.approx(np.mean([values[seed] for seed in "0123"]))
    assert seeds_text({"0": 0.25, "1": 0.5}, signed=True) == "+0.375 (+0.250, +0.500)" and seeds_text({"0": 0.25}) == "0.250"


def test_seeds_are_averaged_case_by_case():
    assert mean_of_seeds({"0": {"a": 1.0, "b": 2.0}, "1": {"b": 4.0, "c": 1.0}}) == {"b": 3.0}


def test_a_relative_gain_is_one_of_the_base():
    assert relative_gain(0.6, 0.5) == pytest.approx(0.2) and math.isnan(relative_gain(0.6, 0.0))


@pytest.mark.parametrize("ties", [False, True])
def test_the_weighted_auc_equals_scikit_learns(ties):
    positive, scores = RNG.random(40) > 0.6, RNG.random(40)
    scores = np.round(scores + 0.3 * positive, 1 if ties else 9)
    weights = RNG.integers(0, 3, (6, 40)).astype(float)
    expected = [roc_auc_score(positive, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(weighted_auc(scores, positive, weights), expected)


def test_only_cases_of_one_fold_are_compared():
    positive, scores, folds = RNG.random(60) > 0.5, RNG.random(60), np.arange(60) % 3
    weights = np.ones((1, 60))
    found = weighted_auc(scores, positive, weights, folds)
    np.testing.assert_allclose(weighted_auc(scores + 10 * folds, positive, weights, folds), found)  # another scale of each model
    each = [(roc_auc_score(positive[own], scores[own]), positive[own].sum() * (~positive[own]).sum()) for own in (folds == fold for fold in range(3))]
    np.testing.assert_allclose(found, np.average([auc for auc, _ in each], weights=[pairs for _, pairs in each]))
    assert np.isnan(weighted_auc(scores, np.zeros(60, bool), weights)).all()


def test_subjects_are_drawn_as_a_whole():
    groups = ["a", "b", "a", "c", "b", "a"]
    weights = bootstrap_weights(groups, resamples=500)
    assert weights.shape == (500, 6) and (weights[:, 0] == weights[:, 2]).all() and (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, 0] + weights[:, 1] + weights[:, 3] == 3).all()  # as many subjects as there are
    mixed = bootstrap_weights(groups[::-1], resamples=500)
    assert np.array_equal(mixed[:, ::-1], weights)


def test_draws_without_a_figure_do_not_count():
    assert percentile_interval(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0) and math.isnan(percentile_interval(np.array([np.nan]))[0])
