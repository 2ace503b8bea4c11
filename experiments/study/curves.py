"""Learning curves: the tables that records.collect gathers from runs that are evaluated on their way, and lines."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from experiments.study.statistics import summarise
from vocabfold.errors import UserError
from vocabfold.runs.tables import RESULTS


def read_curves(experiment: str, corpus: str, results: Path = RESULTS) -> pd.DataFrame:
    """results/CORPUS/EXPERIMENT_curves.csv. Raises UserError where there is none or it is another's."""
    path = results / corpus / f"{experiment}_curves.csv"
    if not path.is_file():
        raise UserError(f"{path} is missing: run `python -m experiments {experiment} measure` first")
    table = pd.read_csv(path)
    if missing := [name for name in ("experiment", "seed", "step", "train_loss") if name not in table.columns]:
        raise UserError(f"{path} has no column {missing[0]}: another version wrote it; measure again")
    return table


def draw_curve(axis: Axes, rows: pd.DataFrame, column: str, color: str, label: str, style: str = "-") -> None:
    """The mean of ``column`` over seeds against the step, with its 95% interval where there are several seeds; a mark
    where there is one step alone."""
    curve = summarise(rows.dropna(subset=[column]), ["step"], column).sort_values("step")
    marker = "o" if len(curve) == 1 else None
    axis.plot(curve["step"], curve["mean"], style, color=color, label=label, marker=marker)
    low, high = curve["mean"] - curve["half_width"], curve["mean"] + curve["half_width"]
    axis.fill_between(curve["step"], low, high, color=color, alpha=0.2, linewidth=0)


def runs_of(curves: pd.DataFrame) -> str:
    """What was run, in words: the caption of a picture of learning curves."""
    runs = curves.groupby(["head", "learning_rate", "seed"]).ngroups
    seeds = curves["seed"].nunique()
    return f"{seeds} seeds, 95% intervals; {runs} runs" if seeds > 1 else f"one seed; {runs} runs"
