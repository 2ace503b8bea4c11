"""Figure 7 of arXiv 2411.06371: group accuracy of the grouped head in the image study against optimizer steps.

results/SCALE/shapes_curves.csv -> results/SCALE/figure7_group_accuracy.png, with the published range (results/paper)
and the best group accuracy that pictures which look alike leave (results/SCALE/figure1_shapes.csv)
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from experiments.study.curves import draw_curve, read_curves, runs_of
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, draw_for_scales, save
from vocabfold.runs.record import RESULTS

STYLES = ("--", "-", ":")


def draw(scale: str) -> None:
    """Write one scale's picture."""
    curves = read_curves("shapes", scale).query("head == 'grouped'")
    figure, axis = plt.subplots(figsize=(COLUMN_INCHES, 3.0))
    for style, (learning_rate, rows) in zip(STYLES, curves.groupby("learning_rate"), strict=False):
        label = f"learning rate {learning_rate:g}"
        draw_curve(axis, rows, "validation_group_accuracy", COLORS["blue"], label, style)
    published = pd.read_csv(RESULTS / "paper" / "image_study.csv").query("head == 'grouped'")
    low, high = published["group_accuracy_low"].min(), published["group_accuracy_high"].max()
    axis.axhspan(low, high, color=COLORS["green"], alpha=0.3, linewidth=0, label="published, 184,320 classes")
    table = pd.read_csv(RESULTS / scale / "figure1_shapes.csv")
    best = table.loc[table["quantity"] == "best group accuracy", "value"].iloc[0]
    axis.axhline(best, color=GREY, linewidth=0.8, linestyle="--", label="best possible")
    axis.set(xlabel="Optimizer step", ylabel="Validation group accuracy", ylim=(0, 1.02))
    figure.legend(loc="outside lower center", ncols=2)
    figure.suptitle(f"{table['classes'].iloc[0]:,} classes; {runs_of(curves)}", fontsize=7)
    save(figure, RESULTS / scale / "figure7_group_accuracy.png")


if __name__ == "__main__":
    draw_for_scales("shapes", draw)()
