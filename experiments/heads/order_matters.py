"""Does the order of the vocabulary matter? Loss and group accuracy of folded heads, by order and group size.

results/SCALE/order_matters.csv (the paper's scorer, three sizes) and heads_pareto.csv (one linear layer a group)
-> results/SCALE/order_matters.png and .md
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, draw_for_scales, save
from experiments.study.statistics import difference_over_seeds, mean_and_interval, summarise
from vocabfold.files import write_text
from vocabfold.runs.record import RESULTS, read_table

ORDERS = {
    "bpe": (COLORS["orange"], "s", "-"),
    "random": (GREY, "x", ":"),
    "frequency": (COLORS["blue"], "o", "--"),
    "clustered": (COLORS["green"], "^", "-."),
}
QUANTITIES = {"validation_loss_nats": "Validation loss (nats per token)", "group_accuracy": "Group accuracy"}


def draw(scale: str) -> None:
    """Write one scale's picture and table."""
    table = with_plain_orders(read_table("order_matters", scale))
    figure, axes = plt.subplots(1, 2, figsize=(2 * COLUMN_INCHES, 2.3))
    for axis, (quantity, label) in zip(axes, QUANTITIES.items(), strict=True):
        draw_quantity(axis, table, quantity)
        axis.set_ylabel(label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ORDERS))
    figure.suptitle(caption(table), fontsize=7)
    save(figure, RESULTS / scale / "order_matters.png")
    path = RESULTS / scale / "order_matters.md"
    write_text(path, markdown(table, scale))
    print(f"wrote {path}")


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
    first = table.iloc[0]
    return (
        f"{first['corpus']}, {first['tokens'] / 1e6:.2f} M tokens; scale and shift; {table['seed'].nunique()} seeds, "
        f"95% intervals; {len(table)} runs"
    )


def markdown(table: pd.DataFrame, scale: str) -> str:
    """Means and intervals by scorer, size and order, and each order against the paper's."""
    linear = with_plain_orders(read_table("heads_pareto", scale))
    linear = linear[linear["contender"].str.fullmatch("linear_(" + "|".join(ORDERS) + ")", na=False)]
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
    lines += [
        "",
        f"{caption(table)}. p: paired t-test over seeds. The learning rate of each order was chosen on held-out",
    ]
    lines += ["training text (experiment learning_rates) at the middle size.", ""]
    return "\n".join(lines)


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
        f"| {scorer} | {size} | {order} | {rate:g} | {loss:.3f} ± {loss_width:.3f} | {accuracy:.3f} "
        f"{difference}| {len(rows)} |"
    )


if __name__ == "__main__":
    draw_for_scales("order_matters", draw)()
