"""Two arms of an experiment compared over the seeds that both have."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from scipy import stats

from vocabfold.errors import UserError
from vocabfold.figures import mean_and_interval


@dataclass(frozen=True)
class Difference:
    """One arm minus another over ``count`` seeds: the mean, the half width of its 95% interval (Student's t) and p of a
    paired t-test, both NaN below two seeds."""

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


def difference_over_seeds(
    table: pd.DataFrame, arm: str, first: str, second: str, value: str = "validation_loss_nats"
) -> Difference:
    """``value`` of the rows whose column ``arm`` is ``first`` minus ``second``, seed by seed.

    An arm without rows leaves no seeds and a mean of NaN. Raises UserError where a seed has several rows of one arm.
    """
    table = table[table[arm].isin([first, second])]
    if table.duplicated(["seed", arm]).any():
        raise UserError(
            f"a seed has several rows of one {arm} to compare: keep runs of one corpus and one setting apart"
        )
    by_seed = table.pivot(index="seed", columns=arm, values=value).reindex(columns=[first, second]).dropna()
    if by_seed.empty:
        return Difference(float("nan"), float("nan"), float("nan"), 0)
    mean, half_width = mean_and_interval((by_seed[first] - by_seed[second]).tolist())
    p_value = stats.ttest_rel(by_seed[first], by_seed[second]).pvalue if len(by_seed) > 1 else float("nan")
    return Difference(mean, half_width, float(p_value), len(by_seed))
