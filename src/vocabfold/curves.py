"""Learning curves: a sweep's metrics.jsonl files gathered into one committed table, and how they are drawn.

``python -m vocabfold.curves EXPERIMENT SCALE`` writes results/SCALE/EXPERIMENT_curves.csv, one row a logged step of a
finished run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from vocabfold.command_line import one_line_errors
from vocabfold.errors import UserError
from vocabfold.figures import summarise
from vocabfold.files import write_text
from vocabfold.records import RESULTS, read_metrics

RUN_KEY = ["experiment", "scale", "corpus", "seed", "model", "head", "learning_rate"]
CURVES = [
    "train_loss",
    "validation_loss_nats",
    "validation_accuracy",
    "validation_group_accuracy",
    "validation_token_accuracy",
]


def collect_curves(experiment: str, scale: str, results: Path = RESULTS) -> Path:
    """Gather the curves of an experiment's finished runs; return the table's path. Raises UserError without a run."""
    folder = results / "runs" / scale / experiment
    lines = []
    for path in sorted(folder.glob("*/row.json"), key=lambda path: path.stat().st_mtime):
        row = json.loads(path.read_text(encoding="utf-8"))
        key = {name: row[name] for name in RUN_KEY}
        lines += [key | {name: line.get(name) for name in ["step", *CURVES]} for line in read_metrics(path.parent)]
    if not lines:
        raise UserError(f"{folder} holds no finished run: run `make reproduce SCALE={scale}` first")
    # Of two runs with the same key the table has the newer one, as records.write_table does.
    table = pd.DataFrame(lines).drop_duplicates([*RUN_KEY, "step"], keep="last").sort_values([*RUN_KEY, "step"])
    path = results / scale / f"{experiment}_curves.csv"
    write_text(path, table.to_csv(index=False, float_format="%.6g"))
    return path


def read_curves(experiment: str, scale: str, results: Path = RESULTS) -> pd.DataFrame:
    """The table that ``collect_curves`` wrote. Raises UserError where there is none."""
    path = results / scale / f"{experiment}_curves.csv"
    if not path.is_file():
        raise UserError(f"{path} is missing: run `make reproduce SCALE={scale}` first")
    return pd.read_csv(path)


def draw_curve(axis: Axes, rows: pd.DataFrame, column: str, color: str, label: str, style: str = "-") -> None:
    """The mean of ``column`` over seeds against the step, with its 95% interval where there are several seeds."""
    curve = summarise(rows.dropna(subset=[column]), ["step"], column).sort_values("step")
    axis.plot(curve["step"], curve["mean"], style, color=color, label=label)
    low, high = curve["mean"] - curve["half_width"], curve["mean"] + curve["half_width"]
    axis.fill_between(curve["step"], low, high, color=color, alpha=0.2, linewidth=0)


@one_line_errors
def main() -> None:
    """Command line: EXPERIMENT SCALE."""
    if len(sys.argv) != 3:
        raise UserError("usage: python -m vocabfold.curves EXPERIMENT SCALE")
    print(f"wrote {collect_curves(sys.argv[1], sys.argv[2])}")


if __name__ == "__main__":
    main()
