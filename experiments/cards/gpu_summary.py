"""Medians and spreads of what gpu.py measured, and ratios over rounds that took turns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.cards.rows import OK
from vocabfold.runs.tables import read_rows

COUNTS = ("vocabulary_size", "hidden_size", "num_tokens", "batch_size", "sequence_length")


def read_part(path: Path) -> pd.DataFrame | None:
    """A part's table; None where there is none."""
    if not path.is_file():
        return None
    return read_rows(path)


def summary_of(table: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """One row a case: ``median``, ``low`` and ``high`` (2.5 and 97.5%) of its milliseconds, and the columns of its
    first round; of what was not measured the status and note alone. Of several machines the last counts."""
    rows = []
    for _, of_case in table.groupby(list(keys), sort=False, dropna=False):
        own = of_case[(of_case["hardware"] == of_case["hardware"].iloc[-1]) & (of_case["status"] == OK)]
        row = dict((own if len(own) else of_case).iloc[0 if len(own) else -1])
        times = own["milliseconds"].dropna()
        low, median, high = np.percentile(times, [2.5, 50, 97.5]) if len(times) else (np.nan,) * 3
        rows.append({**row, "median": median, "low": low, "high": high, "times": own["milliseconds"].tolist()})
    return pd.DataFrame(rows)


def chosen(summary: pd.DataFrame, **wanted: Any) -> pd.Series | None:
    """The one measured case with these values; None where there is none."""
    rows = summary
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    rows = rows[rows["status"] == OK]
    return rows.iloc[0] if len(rows) else None


def ratio(above: pd.Series | None, below: pd.Series | None) -> tuple[float, float, float] | None:
    """Median, 2.5 and 97.5% of the ratios of their rounds, which took turns; of the medians where one has fewer."""
    if above is None or below is None or not above["times"] or not below["times"]:
        return None
    if len(above["times"]) == len(below["times"]):
        low, median, high = np.percentile(np.divide(above["times"], below["times"]), [2.5, 50, 97.5])
        return float(median), float(low), float(high)
    value = float(above["median"] / below["median"])
    return value, value, value


def ratio_words(value: tuple[float, float, float] | None) -> str:
    """With its range; "-" for none."""
    if value is None:
        return "-"
    median, low, high = value
    return f"{median:.2f}" if low == high else f"{median:.2f} ({low:.2f} to {high:.2f})"


def time_words(row: pd.Series | None) -> str:
    """Milliseconds with their range, or why there are none."""
    if row is None:
        return "-"
    if row["status"] != OK:
        return str(row["status"])
    if np.isnan(row["median"]):
        return "-"
    return f"{number(row['median'])} ({number(row['low'])} to {number(row['high'])})"


def number(value: float) -> str:
    """Three digits that mean something."""
    if pd.isna(value):
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def reached(value: float | None, goal: float) -> str:
    """The verdict on a goal that is an upper limit."""
    if value is None:
        return "not measured"
    return "reached" if value <= goal else "not reached"


def where(table: pd.DataFrame) -> str:
    """On which machines, with which torch and code."""
    measured = table[table["status"] == OK]
    parts = [", ".join(dict.fromkeys(measured[name].astype(str))) for name in ("hardware", "torch", "commit")]
    return f"{parts[0]}; torch {parts[1]}; commit {parts[2]}."
