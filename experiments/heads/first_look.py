"""A first look, in two minutes: a small model with the full softmax and with the folded head, loss over seconds.

    make smoke

trains both (python -m vocabfold.train --multirun experiment=first_look), gathers results/CORPUS/first_look.csv and
draws first_look.png: which head learns faster on this machine?
"""

from __future__ import annotations

from argparse import Namespace

import matplotlib.pyplot as plt
import pandas as pd

from experiments.study.curves import read_curves
from experiments.study.figures import COLORS, COLUMN_INCHES, save, trained_on
from experiments.study.measuring import add_settings, collect_runs
from vocabfold.runs.tables import RESULTS, read_table

HEADS = {"full": ("full softmax", COLORS["orange"], "s"), "linear_clustered": ("folded head", COLORS["blue"], "o")}

add_options = add_settings


def measure(arguments: Namespace) -> None:
    """Gather the finished training runs into the table and their curves."""
    collect_runs("first_look", arguments.settings)


def draw(corpus: str) -> None:
    """Write the picture; print both losses and speeds."""
    table = read_table("first_look", corpus)
    curves = timed(read_curves("first_look", corpus))
    figure, axis = plt.subplots(figsize=(COLUMN_INCHES, 2.4))
    for head, (name, color, marker) in HEADS.items():
        line = curves[curves["head"] == head]
        axis.plot(line["seconds"], line["validation_loss_nats"], color=color, marker=marker, label=name)
    axis.set(xlabel="Seconds of training", ylabel="Validation loss (nats per token)", xlim=(0, None))
    axis.legend()
    figure.suptitle(trained_on(table), fontsize=7)
    path = RESULTS / corpus / "first_look.png"
    save(figure, path)
    for head, (name, *_) in HEADS.items():
        for _, row in table[table["head"] == head].iterrows():
            speed, loss = row["tokens_per_second"], row["validation_loss_nats"]
            print(
                f"{name}: validation loss {loss:.3f} nats after {row['tokens']:,} tokens, {speed:,.0f} tokens a second"
            )
    print(f"figure: {path}")


def timed(curves: pd.DataFrame) -> pd.DataFrame:
    """The evaluations on the way, with the ``seconds`` of training before each, at the run's mean speed so far."""
    curves = curves.sort_values(["run", "step"])
    speed = curves.groupby("run")["tokens_per_second"].ffill()
    curves = curves.assign(seconds=curves["tokens"] / speed)
    return curves.dropna(subset=["validation_loss_nats", "seconds"])
