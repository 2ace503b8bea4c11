"""Figure 6 of arXiv 2411.06371: training loss of the image study against optimizer steps, at every learning rate.

results/SCALE/shapes_curves.csv -> results/SCALE/figure6_shapes_loss.png; the numbers are in figure2_shapes_accuracy.md
"""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pandas as pd

from experiments.study.curves import draw_curve, read_curves, runs_of
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, draw_for_scales, save
from vocabfold.runs.record import RESULTS

HEADS = {"full": COLORS["orange"], "grouped": COLORS["blue"]}
STYLES = ("--", "-", ":")


def draw(scale: str) -> None:
    """Write one scale's picture."""
    curves = read_curves("shapes", scale)
    classes = int(pd.read_csv(RESULTS / scale / "figure1_shapes.csv")["classes"].iloc[0])
    figure, axes = plt.subplots(1, 2, figsize=(2 * COLUMN_INCHES, 2.3), sharey=True)
    for axis, (head, color) in zip(axes, HEADS.items(), strict=True):
        rows = curves[curves["head"] == head]
        for style, (learning_rate, runs) in zip(STYLES, rows.groupby("learning_rate"), strict=False):
            draw_curve(axis, runs, "train_loss", color, f"{learning_rate:g}", style)
        axis.axhline(math.log(classes), color=GREY, linewidth=0.8, linestyle=(0, (1, 2)), label=f"ln {classes:,}")
        axis.set_title(f"{head} head", fontsize=8)
        axis.set_xlabel("Optimizer step")
        axis.legend(title="learning rate", title_fontsize=7)
    axes[0].set_ylabel("Training loss (nats)")
    axes[0].set_ylim(bottom=0)
    figure.suptitle(f"{classes:,} classes; {runs_of(curves)}", fontsize=7)
    save(figure, RESULTS / scale / "figure6_shapes_loss.png")


if __name__ == "__main__":
    draw_for_scales("shapes", draw)()
