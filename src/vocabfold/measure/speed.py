"""Speed as ratios: the methods take turns on the same machine, so that what slows the machine slows them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vocabfold.errors import UserError
from vocabfold.machine import synchronize


@dataclass(frozen=True)
class Ratio:
    """Median of per-round ratios, with their 2.5 and 97.5 percentiles: the spread of rounds, not of the median."""

    median: float
    low: float
    high: float


def interleaved_seconds(
    methods: Mapping[str, Callable[[], Any]], rounds: int, warmup: int, device: torch.device, progress: bool
) -> dict[str, list[float]]:
    """Seconds of every call of every method, `rounds` each, after `warmup` untimed calls of each.

    Every round calls each method once, starting one later than the round before; the device is synchronised around
    each call.
    Raises UserError without methods, with rounds < 1 or warmup < 0.
    """
    if not methods or rounds < 1 or warmup < 0:
        raise UserError(
            "timing needs at least one method, one round and no negative warm-up: "
            f"got {len(methods)} methods, {rounds} rounds, {warmup} warm-up calls"
        )
    names = list(methods)
    for name in names:
        for _ in range(warmup):
            methods[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_index in tqdm(range(rounds), desc="timing rounds", disable=not progress):
        first = round_index % len(names)
        for name in names[first:] + names[:first]:
            synchronize(device)
            start = time.perf_counter()
            methods[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio_summary(seconds: Mapping[str, Sequence[float]], numerator: str, denominator: str) -> Ratio:
    """`numerator` over `denominator`, round by round: above 1 the numerator takes longer.

    Raises UserError for a method that was not timed or methods with different numbers of rounds.
    """
    for name in (numerator, denominator):
        if name not in seconds:
            raise UserError(f"no timings of {name!r}: choose from {', '.join(seconds)}")
    above, below = np.asarray(seconds[numerator]), np.asarray(seconds[denominator])
    if len(above) != len(below) or len(above) == 0:
        raise UserError(
            "ratios need the same rounds, at least one, of both methods: "
            f"{numerator!r} has {len(above)}, {denominator!r} has {len(below)}"
        )
    low, median, high = np.percentile(above / below, [2.5, 50.0, 97.5])
    return Ratio(median=float(median), low=float(low), high=float(high))


def tokens_per_second(seconds: Sequence[float], num_tokens: int) -> float:
    """Median throughput of steps of `num_tokens` = N tokens that took `seconds` each."""
    if len(seconds) == 0:
        raise UserError("tokens per second need at least one timed step")
    return num_tokens / float(np.median(seconds))
