"""Does the order of the vocabulary matter? Loss and group accuracy of folded heads, by order and group size.

    python -m vocabfold.train --multirun experiment=order_matters
    python -m experiments order_matters measure
    python -m experiments order_matters draw [CORPUS ...]

results/CORPUS/order_matters.csv (the paper's scorer, up to three sizes; of several budgets the largest) and
heads_pareto.csv (one linear layer a group; on a text without it the runs of heads_scaling at the same budget)
-> results/CORPUS/order_matters.png and .md; with heads_pareto_curves.csv also order_matters_group_accuracy.png: how
often the likeliest group is the right one, by group size and over training.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from experiments.study.curves import read_curves
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, of_largest_budget, save, seeds_of, trained_on
from experiments.study.measuring import add_settings, collect_runs
from experiments.study.statistics import difference_over_seeds, in_words, mean_and_interval, summarise
from vocabfold.files import write_text
from vocabfold.runs.tables import RESULTS, read_table

ORDERS = {
    "bpe": (COLORS["orange"], "s", "-"),
    "random": (GREY, "x", ":"),
    "frequency": (COLORS["blue"], "o", "--"),
    "clustered": (COLORS["green"], "^", "-."),
}
SCORERS = {"scale_shift": ("scale and shift", "s", "--"), "linear": ("one linear layer a group", "o", "-")}
SCALING_HEADS = ("linear_bpe", "linear_random", "linear_frequency", "linear_clustered")
LINEAR_HEADS = {
    "linear_bpe": "bpe",
    "linear_random": "random",
    "linear_frequency": "frequency",
    "linear_clustered": "clustered",
}
FAILURE = 0.9  # below which reviews of the paper call the group scorer a failure
QUANTITIES = {"validation_loss_nats": "Validation loss (nats per token)", "group_accuracy": "Group accuracy"}


add_options = add_settings


def measure(arguments: Namespace) -> None:
    """Gather the finished training runs into the table."""
    collect_runs("order_matters", arguments.settings)


def draw(corpus: str) -> None:
    """Write one corpus' pictures and table."""
    table = of_largest_budget(with_plain_orders(read_table("order_matters", corpus)))
    figure, axes = plt.subplots(1, 2, figsize=(2 * COLUMN_INCHES, 2.3))
    for axis, (quantity, label) in zip(axes, QUANTITIES.items(), strict=True):
        draw_quantity(axis, table, quantity)
        axis.set_ylabel(label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ORDERS))
    figure.suptitle(caption(table), fontsize=7)
    save(figure, RESULTS / corpus / "order_matters.png")
    path = RESULTS / corpus / "order_matters.md"
    write_text(path, markdown(table, corpus))
    print(f"wrote {path}")
    if (RESULTS / corpus / "heads_pareto_curves.csv").is_file():
        draw_group_accuracy(table, corpus)


def draw_group_accuracy(table: pd.DataFrame, corpus: str) -> None:
    """Group accuracy against group size at the end, and over training at the middle size for both scorers."""
    curves = read_curves("heads_pareto", corpus).dropna(subset=["validation_loss_nats"])
    figure, axes = plt.subplots(1, 2, figsize=(2 * COLUMN_INCHES, 2.4), sharey=True)
    rows = summarise(table, ["partition_order", "group_size"], "group_accuracy")
    trained = {f"scale_shift_{order}": (order, "scale_shift") for order in ORDERS}
    trained |= {head: (order, "linear") for head, order in LINEAR_HEADS.items()}
    for order, (color, _, _) in ORDERS.items():
        line = rows[rows["partition_order"] == order].sort_values("group_size")
        style: dict[str, Any] = {"color": color, "marker": "s", "linestyle": "--", "capsize": 2}
        axes[0].errorbar(line["group_size"], line["mean"], yerr=line["half_width"], **style)
        axes[1].plot([], [], color=color, label=order)
    for head, (order, scorer) in trained.items():
        _, marker, dash = SCORERS[scorer]
        line = summarise(curves[curves["head"] == head], ["tokens"], "validation_group_accuracy")
        axes[1].plot(line["tokens"] / 1e6, line["mean"], color=ORDERS[order][0], marker=marker, linestyle=dash)
    sizes = sorted(table["group_size"].unique())
    axes[0].set_xscale("log")
    axes[0].set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes[0].minorticks_off()
    axes[0].set(xlabel="Group size S (tokens)", ylabel="Validation group accuracy", ylim=(0, 1))
    axes[1].set(xlabel="Training tokens (millions)")
    for axis in axes:
        axis.axhline(FAILURE, color=GREY, linewidth=0.8, linestyle=":")
    for name, marker, dash in SCORERS.values():
        axes[1].plot([], [], color="black", marker=marker, linestyle=dash, label=name)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(ORDERS) + len(SCORERS))
    seeds = table["seed"].nunique()
    figure.suptitle(f"{trained_on(table)}; {seeds} seeds, 95% intervals; dotted: {FAILURE:.0%}", fontsize=7)
    save(figure, RESULTS / corpus / "order_matters_group_accuracy.png")


def with_plain_orders(table: pd.DataFrame) -> pd.DataFrame:
    """Without the seed of a random order, which goes with the run's own."""
    return table.assign(partition_order=table["partition_order"].str.replace(r"_seed\d+$", "", regex=True))


def draw_quantity(axis: Axes, table: pd.DataFrame, quantity: str) -> None:
    """Mean and 95% interval over seeds against group size, a line an order."""
    rows = summarise(table, ["partition_order", "group_size"], quantity)
    for number, (order, (color, marker, dash)) in enumerate(ORDERS.items()):
        line = rows[rows["partition_order"] == order].sort_values("group_size")
        shifted = line["group_size"] * 1.03 ** (number - 1.5)  # so that intervals do not hide each other
        style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": dash, "capsize": 2}
        axis.errorbar(shifted, line["mean"], yerr=line["half_width"], label=order, **style)
    sizes = sorted(table["group_size"].unique())
    axis.set_xscale("log")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.set_xlabel("Group size S (tokens)")


def caption(table: pd.DataFrame) -> str:
    """What was trained, how often."""
    intervals = ", 95% intervals" if table["seed"].nunique() > 1 else ""
    return f"{trained_on(table)}; scale and shift; {seeds_of(table)}{intervals}; {len(table)} runs"


def markdown(table: pd.DataFrame, corpus: str) -> str:
    """Means and intervals by scorer, size and order, and each order against the paper's."""
    linear = linear_runs(table, corpus)
    lines = ["| scorer | S | order | learning rate | loss (nats) | group accuracy | minus bpe (nats) | p | seeds |"]
    lines.append("|---" * 9 + "|")
    for scorer, rows in (("scale and shift", table), ("one linear layer a group", linear)):
        for size in sorted(rows["group_size"].unique()):
            of_size = rows[rows["group_size"] == size]
            lines += [
                line_of(scorer, int(size), order, of_size)
                for order in ORDERS
                if order in of_size["partition_order"].to_numpy()
            ]
    tuned = (RESULTS / corpus / "learning_rates.csv").is_file()
    chosen = (
        "The learning rate of each order was chosen on held-out\ntraining text (experiment learning_rates) at the "
        "middle size."
    )
    lines += ["", f"{caption(table)}. p: paired t-test over seeds. {chosen if tuned else 'One rate a scorer.'}", ""]
    return "\n".join(lines)


def linear_runs(table: pd.DataFrame, corpus: str) -> pd.DataFrame:
    """The runs with one linear layer a group in each order: of heads_pareto, or on a text without it those of
    heads_scaling with the budget and hidden size of ``table``; none where neither is there."""
    if (RESULTS / corpus / "heads_pareto.csv").is_file():
        linear = with_plain_orders(read_table("heads_pareto", corpus))
        return linear[linear["head"].isin(LINEAR_HEADS)]
    if not (RESULTS / corpus / "heads_scaling.csv").is_file():
        return table.iloc[:0]
    linear = with_plain_orders(read_table("heads_scaling", corpus))
    same = linear["tokens"].isin(table["tokens"]) & linear["hidden_size"].isin(table["hidden_size"])
    return linear[same & linear["head"].isin(SCALING_HEADS)]


def line_of(scorer: str, size: int, order: str, of_size: pd.DataFrame) -> str:
    """One order at one size, with its paired difference to the order of the token ids."""
    rows = of_size[of_size["partition_order"] == order]
    loss, loss_width = mean_and_interval(rows["validation_loss_nats"].tolist())
    accuracy, _ = mean_and_interval(rows["group_accuracy"].tolist())
    difference = "| | "
    if order != "bpe" and (found := difference_over_seeds(of_size, "partition_order", order, "bpe")).count > 1:
        difference = f"| {found.mean:+.3f} ± {found.half_width:.3f} | {found.p_value:.2g} "
    rate = rows["learning_rate"].iloc[0]
    return (
        f"| {scorer} | {size} | {order} | {rate:g} | {in_words(loss, loss_width)} | {accuracy:.3f} "
        f"{difference}| {len(rows)} |"
    )
