"""Figure 2 of arXiv 2411.06371: validation accuracy of the image study against optimizer steps, and by learning rate.

results/SCALE/shapes_curves.csv -> results/SCALE/figure2_shapes_accuracy.png and .md; the best accuracy that pictures
which look alike leave is drawn from results/SCALE/figure1_shapes.csv
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from experiments.study.curves import draw_curve, read_curves, runs_of
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, draw_for_scales, save
from experiments.study.statistics import difference_over_seeds, mean_and_interval, summarise
from vocabfold.files import write_text
from vocabfold.runs.record import RESULTS

PUBLISHED_LEARNING_RATE = 1e-3
HEADS = {"full": (COLORS["orange"], "s"), "grouped": (COLORS["blue"], "o")}
QUANTITIES = {
    "validation_accuracy": ("validation accuracy", "{:.4f}"),
    "validation_group_accuracy": ("validation group accuracy", "{:.4f}"),
    "validation_loss_nats": ("validation loss (nats)", "{:.3f}"),
    "train_loss": ("training loss (nats)", "{:.3f}"),
}


def draw(scale: str) -> None:
    """Write one scale's picture and table."""
    curves = read_curves("shapes", scale)
    ends = ends_of(curves)
    figure, axes = plt.subplots(1, 2, figsize=(2 * COLUMN_INCHES, 2.3), sharey=True)
    published = curves[curves["learning_rate"] == PUBLISHED_LEARNING_RATE]
    for head, (color, marker) in HEADS.items():
        draw_curve(axes[0], published[published["head"] == head], "validation_accuracy", color, head)
        rows = summarise(ends[ends["head"] == head], ["learning_rate"], "validation_accuracy")
        axes[1].errorbar(
            rows["learning_rate"],
            rows["mean"],
            yerr=rows["half_width"],
            color=color,
            marker=marker,
            capsize=3,
            label=head,
        )
    axes[0].set(xlabel=f"Optimizer step (learning rate {PUBLISHED_LEARNING_RATE:g})", ylabel="Validation accuracy")
    axes[1].set(xlabel="Learning rate", xscale="log")
    rates = sorted(ends["learning_rate"].unique())
    axes[1].set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes[1].minorticks_off()
    for axis in axes:
        axis.axhline(ceiling(scale), color=GREY, linewidth=0.8, linestyle="--", label="best possible")
    axes[0].set_ylim(0, 1)
    axes[0].legend(loc="best")
    figure.suptitle(runs_of(curves), fontsize=7)
    save(figure, RESULTS / scale / "figure2_shapes_accuracy.png")
    path = RESULTS / scale / "figure2_shapes_accuracy.md"
    write_text(path, markdown(ends, scale))
    print(f"wrote {path}")


def ends_of(curves: pd.DataFrame) -> pd.DataFrame:
    """Where each run's curve ends."""
    return curves.sort_values("step").groupby(["head", "learning_rate", "seed"], as_index=False).last()


def ceiling(scale: str) -> float:
    """The best accuracy that pictures which look alike leave."""
    table = pd.read_csv(RESULTS / scale / "figure1_shapes.csv")
    return float(table.loc[table["quantity"] == "best accuracy", "value"].iloc[0])


def markdown(ends: pd.DataFrame, scale: str) -> str:
    """Where each head ends at each learning rate: means and 95% intervals over seeds."""
    lines = [
        "| head, learning rate | " + " | ".join(title for title, _ in QUANTITIES.values()) + " | seeds |",
        "|---" * (len(QUANTITIES) + 2) + "|",
    ]
    for (head, learning_rate), rows in ends.groupby(["head", "learning_rate"]):
        cells = []
        for column, (_, form) in QUANTITIES.items():
            mean, half_width = mean_and_interval(rows[column].dropna().tolist() or [float("nan")])
            cells.append("" if pd.isna(mean) else f"{form.format(mean)} ± {form.format(half_width)}")
        lines.append(f"| {head}, {learning_rate:g} | " + " | ".join(cells) + f" | {len(rows)} |")
    notes = [f"At step {ends['step'].max():,}; mean ± 95% interval (Student's t) over seeds.", *difference(ends)]
    return "\n".join([*lines, "", *notes, f"Best possible accuracy: {ceiling(scale):.4f}.", ""])


def difference(ends: pd.DataFrame) -> list[str]:
    """Grouped minus full in accuracy at each learning rate, seed by seed."""
    lines = []
    for learning_rate, rows in ends.groupby("learning_rate"):
        found = difference_over_seeds(rows, "head", "grouped", "full", "validation_accuracy")
        if found.count > 1:
            lines.append(
                f"Learning rate {learning_rate:g}: grouped minus full {found.mean:+.4f} ± {found.half_width:.4f} in "
                f"accuracy (paired t-test over {found.count} seeds, p = {found.p_value:.2g})."
            )
    return lines


if __name__ == "__main__":
    draw_for_scales("shapes", draw)()
