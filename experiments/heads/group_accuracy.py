"""How often the folded head's likeliest group is the right one: by group size and order, and over training.

results/SCALE/order_matters.csv and heads_pareto_curves.csv -> results/SCALE/group_accuracy.png
"""

from __future__ import annotations

import matplotlib.pyplot as plt

from experiments.study.curves import read_curves
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, draw_for_scales, save
from experiments.study.statistics import summarise
from vocabfold.runs.record import RESULTS, read_table

ORDERS = {"bpe": COLORS["orange"], "random": GREY, "frequency": COLORS["blue"], "clustered": COLORS["green"]}
SCORERS = {"scale_shift": ("scale and shift", "s", "--"), "linear": ("linear", "o", "-")}
FAILURE = 0.9  # below which reviews of the paper call the group scorer a failure


def draw(scale: str) -> None:
    """Write one scale's picture."""
    table = read_table("order_matters", scale)
    curves = read_curves("heads_pareto", scale).dropna(subset=["validation_loss_nats"])
    figure, axes = plt.subplots(1, 2, figsize=(2 * COLUMN_INCHES, 2.4), sharey=True)
    rows = summarise(table, ["contender", "group_size"], "group_accuracy")
    for order, color in ORDERS.items():
        line = rows[rows["contender"] == f"scale_shift_{order}"].sort_values("group_size")
        axes[0].errorbar(
            line["group_size"],
            line["mean"],
            yerr=line["half_width"],
            color=color,
            marker="s",
            linestyle="--",
            capsize=2,
        )
        for scorer, (_, marker, dash) in SCORERS.items():
            line = summarise(
                curves[curves["contender"] == f"{scorer}_{order}"], ["tokens"], "validation_group_accuracy"
            )
            axes[1].plot(line["tokens"] / 1e6, line["mean"], color=color, marker=marker, linestyle=dash)
    sizes = sorted(table["group_size"].unique())
    axes[0].set_xscale("log")
    axes[0].set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes[0].minorticks_off()
    axes[0].set(xlabel="Group size S (tokens)", ylabel="Validation group accuracy", ylim=(0, 1))
    axes[1].set(xlabel="Training tokens (millions)")
    for axis in axes:
        axis.axhline(FAILURE, color=GREY, linewidth=0.8, linestyle=":")
    for order, color in ORDERS.items():
        axes[1].plot([], [], color=color, label=order)
    for name, marker, dash in SCORERS.values():
        axes[1].plot([], [], color="black", marker=marker, linestyle=dash, label=name)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(ORDERS) + len(SCORERS))
    first = table.iloc[0]
    figure.suptitle(
        f"{first['corpus']}, {first['tokens'] / 1e6:.2f} M tokens; {table['seed'].nunique()} seeds, 95% intervals; "
        "dotted: 90%",
        fontsize=7,
    )
    save(figure, RESULTS / scale / "group_accuracy.png")


if __name__ == "__main__":
    draw_for_scales("order_matters", draw)()
