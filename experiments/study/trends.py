"""How a difference changes with the training tokens: a straight line over their logarithm, and where it meets zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from experiments.study.statistics import LEVEL

LEAST_POINTS = 3  # a line through two has no interval


@dataclass(frozen=True)
class Crossing:
    """Where a line meets zero, and the 95% interval of that place (Fieller, J. R. Stat. Soc. B 16, 1954): all x at
    which the band of the line holds zero. ``low`` 0 or ``high`` infinite: the points do not bound it on that side."""

    place: float
    low: float
    high: float


@dataclass(frozen=True)
class Trend:
    """y = mean + slope (log2 x - centre) by least squares over ``count`` points between ``lowest`` and ``highest`` x.

    ``slope``: change of y for twice the x; ``half_width``: of its 95% interval (Student's t); ``p_value``: of slope 0.
    ``curvature_p``: of a square term that is 0 (NaN below four points or three places): small, and a straight line does
    not describe the points, let alone what lies beyond them.
    """

    mean: float
    slope: float
    centre: float
    half_width: float
    p_value: float
    curvature_p: float
    count: int
    lowest: float
    highest: float
    residual: float  # standard deviation of the points about the line
    spread: float  # sum of squares of log2 x about the centre

    @property
    def quantile(self) -> float:
        """Student's t for a 95% interval of what the line says."""
        return float(stats.t.ppf(1 - LEVEL / 2, self.count - 2))

    def at(self, place: float) -> tuple[float, float]:
        """The line at x = ``place`` and the half width of its 95% interval there."""
        offset = math.log2(place) - self.centre
        error = self.residual * math.sqrt(1 / self.count + offset**2 / self.spread)
        return self.mean + self.slope * offset, self.quantile * error

    def crossing(self) -> Crossing:
        """Where the line is 0; infinite for one without a slope."""
        place = _power(self.centre - self.mean / self.slope) if self.slope else math.inf
        reach = (self.quantile * self.residual) ** 2
        square = self.slope**2 - reach / self.spread
        linear, constant = 2 * self.mean * self.slope, self.mean**2 - reach / self.count
        discriminant = linear**2 - 4 * square * constant
        if square > 0:  # the slope differs from 0, so both ends exist
            low, high = sorted((-linear + sign * math.sqrt(max(0.0, discriminant))) / (2 * square) for sign in (-1, 1))
            return Crossing(place, _power(self.centre + low), _power(self.centre + high))
        if square == 0 or discriminant <= 0:
            return Crossing(place, 0.0, math.inf)
        # Zero lies outside the band between the roots, and in it on both sides: the line may meet zero either way.
        below, above = sorted((-linear + sign * math.sqrt(discriminant)) / (2 * square) for sign in (-1, 1))
        if place > _power(self.centre):
            return Crossing(place, _power(self.centre + above), math.inf)
        return Crossing(place, 0.0, _power(self.centre + below))


def trend(places: Sequence[float], values: Sequence[float]) -> Trend | None:
    """The line of ``values`` over log2 of ``places``; None where there are fewer than three points or two places."""
    if len(places) < LEAST_POINTS or len(set(places)) < 2:
        return None
    logs, heights = np.log2(np.asarray(places, dtype=float)), np.asarray(values, dtype=float)
    centre, mean = float(logs.mean()), float(heights.mean())
    offsets = logs - centre
    spread = float((offsets**2).sum())
    slope = float((offsets * heights).sum() / spread)
    residual = math.sqrt(float(((heights - mean - slope * offsets) ** 2).sum()) / (len(logs) - 2))
    error = residual / math.sqrt(spread)
    p_value = float(2 * stats.t.sf(abs(slope) / error, len(logs) - 2)) if error > 0 else float(slope == 0)
    half_width = float(stats.t.ppf(1 - LEVEL / 2, len(logs) - 2)) * error
    return Trend(
        mean,
        slope,
        centre,
        half_width,
        p_value,
        _curvature_p(offsets, heights),
        len(logs),
        float(min(places)),
        float(max(places)),
        residual,
        spread,
    )


def _curvature_p(offsets: np.ndarray, heights: np.ndarray) -> float:
    """The p-value of the square term of a parabola through the points."""
    if len(offsets) < 4 or len(set(offsets.tolist())) < 3:
        return float("nan")
    columns = np.stack([np.ones_like(offsets), offsets, offsets**2], axis=1)
    solution = np.linalg.lstsq(columns, heights, rcond=None)[0]
    freedom = len(offsets) - 3
    variance = float(((heights - columns @ solution) ** 2).sum()) / freedom
    error = math.sqrt(variance * float(np.linalg.inv(columns.T @ columns)[2, 2]))
    return float(2 * stats.t.sf(abs(float(solution[2])) / error, freedom)) if error > 0 else float("nan")


def _power(exponent: float) -> float:
    """2 to the ``exponent``, infinite or 0 where that is no number of a computer's."""
    return math.inf if exponent > 1000 else 0.0 if exponent < -1000 else 2.0**exponent
