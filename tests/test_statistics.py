"""The tests and intervals against scipy, closed forms and simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from experiments.study.statistics import LEVEL, Equivalence, equivalence, paired_bootstrap, paired_difference
from scipy import stats

from vocabfold.errors import UserError


def test_a_paired_difference_is_the_one_sample_test_of_differences() -> None:
    values, reference = [4.1, 4.3, 4.25], [4.0, 4.1, 4.3]
    result = paired_difference(values, reference)
    one = stats.ttest_1samp(np.subtract(values, reference), 0)
    low, high = one.confidence_interval(0.95)
    assert (result.mean - result.half_width, result.mean + result.half_width) == pytest.approx((low, high))
    assert result.p_value == pytest.approx(one.pvalue) and result.count == 3


def test_one_pair_has_no_interval_and_no_p_value() -> None:
    result = paired_difference([1.5], [1.0])
    assert result.mean == 0.5 and math.isnan(result.half_width) and math.isnan(result.p_value)


def test_equivalence_by_hand() -> None:
    # differences -0.01, 0, 0.01: mean 0, standard error 0.01 / sqrt(3), 2 degrees of freedom
    result = equivalence([0.99, 1.0, 1.01], [1.0, 1.0, 1.0], margin=0.05)
    assert result.p_value == pytest.approx(stats.t.sf(0.05 * math.sqrt(3) / 0.01, 2))
    assert (result.low, result.high) == pytest.approx((-0.016859, 0.016859), abs=1e-6)  # t at 95%: 2.919986
    assert result.verdict == "equivalent"


@pytest.mark.parametrize(
    ("shift", "spread", "verdict"),
    [(0.0, 0.01, "equivalent"), (0.6, 0.01, "greater"), (-0.6, 0.01, "less"), (0.04, 0.05, "undecided")],
)
def test_the_verdict_is_where_the_interval_lies(shift: float, spread: float, verdict: str) -> None:
    reference = np.array([4.0, 4.1, 4.2])
    values = reference + shift + spread * np.array([-1.0, 0.0, 1.0])
    result = equivalence(values.tolist(), reference.tolist(), 0.05)
    assert result.verdict == verdict
    # the two descriptions of a TOST agree: p below 5% exactly where the 90% interval lies within the margin
    assert (result.p_value < LEVEL) == (result.low > -0.05 and result.high < 0.05)
    mirrored = equivalence(reference.tolist(), values.tolist(), 0.05)
    assert mirrored.p_value == pytest.approx(result.p_value)


def test_equivalence_keeps_its_level_at_the_margin() -> None:
    # the worst case of "not equivalent" is a difference of exactly the margin: called equivalent in at most 5% of cases
    generator = np.random.default_rng(0)
    seeds, zero = 3, [0.0] * 3
    for spread, trials in ((0.005, 700), (0.03, 200)):
        margin = np.where(np.arange(trials) % 2, 0.05, -0.05)
        drawn = generator.normal(margin[:, None], spread, (trials, seeds))
        share = np.mean([equivalence(row.tolist(), zero, 0.05).p_value < LEVEL for row in drawn])
        assert share <= LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / trials)
        if spread == 0.005:  # far from the other margin the test is exact, not only safe
            assert share >= LEVEL - 3 * math.sqrt(LEVEL * (1 - LEVEL) / trials)


def test_the_bootstrap_is_of_the_ratio_of_sums() -> None:
    tokens = np.array([10.0, 1000.0, 20.0])
    loss, reference = np.array([20.0, 4000.0, 80.0]), np.array([10.0, 5000.0, 60.0])
    result = paired_bootstrap(loss, reference, tokens, resamples=500)
    assert result.mean == pytest.approx((loss.sum() - reference.sum()) / 1030)
    assert result.low <= result.mean <= result.high
    assert paired_bootstrap(loss, reference, tokens, resamples=500) == result  # the same draws each time


def test_the_bootstrap_agrees_with_the_normal_interval_of_many_documents() -> None:
    generator = np.random.default_rng(1)
    tokens = generator.integers(50, 400, 1500).astype(float)
    reference = 4.0 * tokens
    loss = reference + 0.1 * tokens + generator.normal(0, 20, 1500)
    result = paired_bootstrap(loss, reference, tokens, resamples=2000)
    residual = loss - reference - result.mean * tokens  # the delta method's standard error of a ratio
    half_width = 1.96 * np.sqrt(1500) * residual.std(ddof=1) / tokens.sum()
    assert (result.low, result.high) == pytest.approx((result.mean - half_width, result.mean + half_width), rel=0.02)


def test_the_bootstrap_covers_the_truth() -> None:
    generator = np.random.default_rng(2)
    covered, trials = 0, 100
    for _ in range(trials):
        tokens = generator.integers(20, 200, 100).astype(float)
        loss = 0.1 * tokens + generator.exponential(5, 100) - 5  # skewed, with mean 0.1 a token
        result = paired_bootstrap(loss, np.zeros(100), tokens, resamples=400)
        covered += result.low <= 0.1 <= result.high
    assert 0.88 <= covered / trials <= 1.0


def test_documents_that_all_differ_alike_have_an_interval_of_one_point() -> None:
    result = paired_bootstrap(np.array([3.0, 3.0]), np.array([2.0, 2.0]), np.array([2.0, 2.0]))
    assert (result.mean, result.low, result.high) == (0.5, 0.5, 0.5)


def test_what_cannot_be_tested_is_refused() -> None:
    with pytest.raises(UserError, match="equally many"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(UserError, match="two pairs"):
        equivalence([1.0], [1.0], 0.05)
    with pytest.raises(UserError, match="positive margin"):
        equivalence([1.0, 2.0], [1.0, 2.0], 0.0)
    with pytest.raises(UserError, match="same documents"):
        paired_bootstrap(np.ones(2), np.ones(2), np.ones(3))


def test_equal_pairs_are_equivalent() -> None:
    result = equivalence([1.0, 2.0], [1.0, 2.0], 0.05)
    assert isinstance(result, Equivalence) and result.verdict == "equivalent"
