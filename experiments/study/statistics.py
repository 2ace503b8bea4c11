"""The statistics behind every comparison: intervals, paired tests over seeds, a bootstrap over documents, equivalence.

Two runs of the same seed see the same batches, and all see the same validation documents, so comparisons are paired.
A test over seeds says what another initialisation would give on these documents; a bootstrap over documents says what
these very models would give on other documents of the kind. Neither speaks for the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from vocabfold.errors import UserError

LEVEL = 0.05  # of every test; intervals hold 1 - LEVEL
RESAMPLES = 9_999


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, its 95% interval by Student's t, and the p-value of the paired t-test against 0;
    ``count`` pairs. One pair has neither: NaN."""

    mean: float
    half_width: float
    p_value: float
    count: int

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.mean + self.half_width


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Equivalence:
    """What two one-sided tests say of a mean difference and a margin.

    ``p_value`` is of "the difference is at least the margin, one way or the other": below LEVEL the two are equivalent.
    ``low`` to ``high`` is the 90% interval, which lies within the margin exactly when they are.
    """

    margin: float
    p_value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``equivalent``, ``greater`` or ``less`` (by more than the margin, the 90% interval beyond it), else
        ``undecided``."""
        if self.p_value < LEVEL:
            return "equivalent"
        if self.low > self.margin:
            return "greater"
        return "less" if self.high < -self.margin else "undecided"


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the half width of its 95% interval by Student's t; the half width of one value is NaN."""
    count = len(values)
    if count < 2:
        return float(np.mean(values)), float("nan")
    return float(np.mean(values)), float(stats.t.ppf(1 - LEVEL / 2, count - 1) * stats.sem(values))


def in_words(mean: float, half_width: float) -> str:
    """A mean with its interval, which one value does not have."""
    return f"{mean:.3f}" if math.isnan(half_width) else f"{mean:.3f} ± {half_width:.3f}"


def summarise(table: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    """Columns ``by``, mean, half_width (95%, Student's t) and seeds of ``value`` over the rows of each group."""
    rows = []
    for key, group in table.groupby(by, dropna=False):
        mean, half_width = mean_and_interval(group[value].dropna().tolist())
        rows.append([*key, mean, half_width, len(group)])
    return pd.DataFrame(rows, columns=[*by, "mean", "half_width", "seeds"])


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """``values`` minus ``reference``, pair by pair, with the paired t-test (Student, Biometrika 1908).

    Raises UserError unless they are equally many, at least one.
    """
    difference = _differences(values, reference)
    mean, half_width = mean_and_interval(difference.tolist())
    p_value = float("nan")
    if len(difference) > 1:
        p_value = float(stats.ttest_rel(values, reference).pvalue)
    return Difference(mean, half_width, p_value, len(difference))


def difference_over_seeds(
    table: pd.DataFrame, arm: str, first: str, second: str, value: str = "validation_loss_nats"
) -> Difference:
    """``value`` of the rows whose column ``arm`` is ``first`` minus ``second``, over the seeds that have both.

    No such seed: a mean of NaN and a count of 0. Raises UserError where a seed has several rows of one arm.
    """
    table = table[table[arm].isin([first, second])]
    if table.duplicated(["seed", arm]).any():
        raise UserError(
            f"a seed has several rows of one {arm} to compare: keep runs of one corpus and one setting apart"
        )
    by_seed = table.pivot(index="seed", columns=arm, values=value).reindex(columns=[first, second]).dropna()
    if by_seed.empty:
        return Difference(float("nan"), float("nan"), float("nan"), 0)
    return paired_difference(by_seed[first].tolist(), by_seed[second].tolist())


def equivalence(values: Sequence[float], reference: Sequence[float], margin: float) -> Equivalence:
    """Two one-sided paired t-tests (TOST; Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987): is the mean of ``values``
    minus ``reference`` above -margin, and is it below margin?

    Raises UserError unless there are at least two pairs and the margin is positive.
    """
    difference = _differences(values, reference)
    if len(difference) < 2 or not margin > 0:
        raise UserError(f"an equivalence test needs two pairs and a positive margin: got {len(difference)}, {margin}")
    above = stats.ttest_1samp(difference, -margin, alternative="greater")
    below = stats.ttest_1samp(difference, margin, alternative="less")
    half_width = float(stats.t.ppf(1 - LEVEL, len(difference) - 1) * stats.sem(difference))
    mean = float(difference.mean())
    return Equivalence(margin, float(max(above.pvalue, below.pvalue)), mean - half_width, mean + half_width)


def paired_bootstrap(
    loss_nats: np.ndarray, reference_nats: np.ndarray, tokens: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Loss a token of one model minus that of another, on documents drawn again with replacement.

    ``loss_nats`` and ``reference_nats`` [documents]: sums over the ``tokens`` [documents] of each; the difference is
    the sum of differences over the sum of tokens, so that a long document weighs as in the whole text's mean. The
    95% interval is bias-corrected and accelerated (Efron, JASA 82, 1987; for comparisons on one test set Koehn, EMNLP
    2004). Raises UserError for fewer than two documents, or arrays of different lengths.
    """
    if not len(loss_nats) == len(reference_nats) == len(tokens) or len(tokens) < 2:
        raise UserError(
            "a bootstrap needs the same documents of both, at least two: got "
            f"{len(loss_nats)}, {len(reference_nats)} and {len(tokens)}"
        )
    difference = np.asarray(loss_nats) - np.asarray(reference_nats)
    mean = float(difference.sum() / np.sum(tokens))
    if np.ptp(difference - mean * np.asarray(tokens)) == 0:  # nothing varies: no resample can differ
        return Interval(mean, mean, mean)

    def per_token(sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(sums.sum(axis) / counts.sum(axis))

    drawn = stats.bootstrap(
        (difference, np.asarray(tokens, dtype=float)),
        per_token,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=500,
        confidence_level=1 - LEVEL,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(drawn.low), float(drawn.high))


def _differences(values: Sequence[float], reference: Sequence[float]) -> np.ndarray:
    if len(values) != len(reference) or len(values) == 0:
        raise UserError(f"paired values must be equally many, at least one: got {len(values)} and {len(reference)}")
    return np.asarray(values, dtype=float) - np.asarray(reference, dtype=float)
