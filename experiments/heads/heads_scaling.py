"""Which head holds as the training text grows: loss against tokens, time and FLOPs, and the gap to the best softmax.

    python -m vocabfold.train --multirun experiment=heads_scaling data=text data.train=FILE data.valid=FILE
    python -m experiments heads_scaling measure [KEY=VALUE ...]
    python -m experiments heads_scaling measure --speed [--rounds 7] [size=hidden128] KEY=VALUE ...
    python -m experiments heads_scaling draw [CORPUS ...]

results/CORPUS/heads_scaling.csv (a row a run; rows of runs trained elsewhere stay) and heads_scaling_cost.csv (whole
training steps of all heads in one interleaved run, by hidden size) -> heads_scaling.md, which says what is missing, and
heads_scaling.png (and _128, _256 for further hidden sizes) where there are two budgets or more: of the heads whose rate
was tuned, or of all where none was, because a head at another rate shows the rate.
"""

from __future__ import annotations

import dataclasses
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from experiments.heads.heads_cost import heads_of, measure_steps
from experiments.heads.heads_pareto import label_plainly
from experiments.heads.scaling_points import (
    arms_by_loss,
    at_budget,
    budgets_of,
    costs_of,
    flops_a_token,
    folded_arms,
    gap,
    gap_trend,
    loss_at,
    points_of,
)
from experiments.heads.scaling_words import SEVERAL, caption, markdown
from experiments.study.collecting import collect_with_settings
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, save
from experiments.study.measuring import (
    add_rounds,
    add_settings,
    identity,
    is_measured,
    measuring_device,
    write_measured,
)
from vocabfold.data.corpora import load_corpus
from vocabfold.files import write_text
from vocabfold.machine import origin
from vocabfold.runs.tables import RESULTS, read_rows, read_table

NAME, COST_NAME = "heads_scaling", "heads_scaling_cost"
# The paper's head at the largest group size of its Figure 3: 13 groups of 3,866 are what 3,864 comes to.
LARGE_GROUPS = {"paper, S = 3,866": ["head=paper", "head.partition.group_size=3864"]}
SMALLEST = 64  # the hidden size whose picture bears the plain name
LOOKS = {
    "full_untied_counts": (COLORS["orange"], "D", "-"),
    "full_counts": (COLORS["orange"], "s", "--"),
    "full_untied": (COLORS["orange"], "x", ":"),
    "full": (COLORS["orange"], "+", ":"),
    "adaptive": (COLORS["red"], "P", "-."),
    "paper": (GREY, "x", ":"),
    "paper, S = 3,866": (GREY, "+", "--"),
    "linear_clustered": (COLORS["blue"], "v", "--"),
    "linear_clustered_counts": (COLORS["blue"], "^", "-"),
    "conditioned_clustered": (COLORS["green"], "o", "--"),
    "conditioned_exchanged": (COLORS["green"], "p", "-"),
    "conditioned_exchanged_wide": (COLORS["green"], "D", "-."),
    "conditioned_tied": (COLORS["green"], "s", ":"),
    "conditioned_tied_wide": ("black", "*", "-"),
}
OTHER_LOOKS = [(COLORS["purple"], marker, dash) for marker in "ph<>1" for dash in ("-", "--")]
STEPS = {"validation_group_loss": "Group loss", "validation_token_loss": "Token loss"}
SHOWN_GAPS = (-0.5, 0.25)  # nats, at most
# The folded head that the steps of others are compared with, by the order of the groups that they share.
PLAIN = {"exchanged": "conditioned_exchanged", "clustered": "linear_clustered_counts"}
BEST = "conditioned_tied_wide"  # conf/head/folded.yaml


def add_options(parser: ArgumentParser) -> None:
    """Which of the two tables, and the text."""
    parser.add_argument("--speed", action="store_true", help="time whole training steps of all heads instead")
    parser.add_argument("--heads", default="", help="comma-separated heads to time (default: those of the sweep)")
    add_rounds(parser, 7)
    add_settings(parser)


def measure(arguments: Namespace) -> None:
    """Gather the finished training runs into the table, or with ``--speed`` time the heads side by side."""
    if arguments.speed:
        measure_speed(arguments)
    else:
        collect_with_settings(NAME, arguments.settings)


def measure_speed(arguments: Namespace) -> None:
    """Time every head at one size of the model; rows of other sizes stay."""
    named = [name for name in arguments.heads.split(",") if name]
    heads = heads_of(arguments.settings, NAME, named, {} if named else LARGE_GROUPS)
    first = next(iter(heads.values()))
    path = RESULTS / first.corpus / f"{COST_NAME}.csv"
    measurement = identity(COST_NAME, arguments, {name: dataclasses.asdict(one) for name, one in heads.items()})
    if is_measured(path, measurement):
        return
    corpus = load_corpus(first.data).with_training_tokens(first.training_tokens)
    table = measure_steps(heads, corpus, arguments.rounds, measuring_device()).assign(**origin())
    write_measured(table, path, measurement, beside="hidden_size")


def draw(corpus: str) -> None:
    """Write one corpus' pictures, one a hidden size with several budgets, and its table in words."""
    table = read_table(NAME, corpus)
    cost_path = RESULTS / corpus / f"{COST_NAME}.csv"
    timed = read_rows(cost_path) if cost_path.is_file() else None
    sizes = sorted(int(size) for size in table["hidden_size"].unique())
    parts = []
    for size in sizes:
        points = points_of(table, size, corpus)
        costs = costs_of(timed, size)
        seconds = {arm: 1 / cost.tokens_per_second for arm, cost in costs.items()}
        suffix = "" if size == min(SMALLEST, *sizes) else f"_{size}"
        shown = points[points["tuned"]] if points["tuned"].any() else points
        if len(budgets_of(shown)) > 1:
            draw_points(shown, seconds, RESULTS / corpus / f"{NAME}{suffix}.png")
        parts.append(markdown(points, costs, corpus))
    path = RESULTS / corpus / f"{NAME}.md"
    write_text(path, "\n".join(parts))
    print(f"wrote {path}")


def draw_points(points: pd.DataFrame, seconds: Mapping[str, float], path: Path) -> None:
    """One hidden size: loss against tokens, time and FLOPs, the gap with its lines, and which step of a folded head
    holds."""
    figure, axes = plt.subplots(2, 3, figsize=(2.3 * COLUMN_INCHES, 4.8))
    looks = looks_of(points)
    draw_losses(axes[0, 0], points, looks, dict.fromkeys(looks, 1e-6), "Training tokens (millions)")
    draw_gaps(axes[0, 1], points, looks)
    draw_losses(axes[1, 0], points, looks, seconds, "Training time (s)")
    flops = {arm: value / 1e12 for arm, value in flops_a_token(points).items()}
    draw_losses(axes[1, 1], points, looks, flops, "Training FLOPs (10¹²)")
    for axis, (column, label) in zip((axes[0, 2], axes[1, 2]), STEPS.items(), strict=True):
        draw_step(axis, points, looks, column, label)
    trained = [math.prod(budget) / 1e6 for budget in budgets_of(points)]
    for axis in (*axes[0], axes[1, 2]):
        axis.set_xlim(min(trained) / 1.3, max(trained) * 1.3)  # one scale for all, even where few points are
    handles, labels = axes[0, 0].get_legend_handles_labels()
    labels = [f"{label} (head=folded)" if label == BEST else label for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=6)
    figure.suptitle(caption(points, "three"), fontsize=7)
    save(figure, path)


def looks_of(points: pd.DataFrame) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and dash of each arm: those agreed on, further heads in an order of their own."""
    known = [arm for arm in LOOKS if arm in set(points["arm"])]
    others = [arm for arm in arms_by_loss(points) if arm not in LOOKS]
    looks = {arm: LOOKS[arm] for arm in known}
    return looks | {arm: OTHER_LOOKS[index % len(OTHER_LOOKS)] for index, arm in enumerate(sorted(others))}


def draw_losses(
    axis: Axes, points: pd.DataFrame, looks: dict[str, Any], a_token: Mapping[str, float], label: str
) -> None:
    """Mean loss with its 95% interval against what the training tokens cost; hollow: a text read more than once."""
    for arm, (color, marker, dash) in looks.items():
        if arm not in a_token:
            continue
        budgets = budgets_of(points[points["arm"] == arm])
        cost = [a_token[arm] * math.prod(budget) for budget in budgets]
        found = [loss_at(points, arm, one, "validation_loss_nats") for one in budgets]
        means, widths = [one[0] for one in found], [shown_width(one[1], one[2]) for one in found]
        style: dict[str, Any] = {"color": color, "linestyle": dash, "capsize": 2, "label": arm}
        axis.errorbar(cost, means, yerr=widths, marker=marker, **style)
        again = [index for index, budget in enumerate(budgets) if budget[1] != 1]
        if again:
            hollow = {"linestyle": "", "marker": "o", "markersize": 6, "markerfacecolor": "none", "color": color}
            axis.plot([cost[index] for index in again], [means[index] for index in again], **hollow)
    axis.set(xlabel=label, ylabel="Validation loss (nats)")
    finish(axis)


def shown_width(half_width: float, seeds: int) -> float:
    """Of an interval over so many seeds: one over two tells of the two alone, and would cover the others."""
    return half_width if seeds >= SEVERAL else 0.0


def draw_gaps(axis: Axes, points: pd.DataFrame, looks: dict[str, Any]) -> None:
    """The gap to the best full softmax at equal tokens, and for each folded head its line over log tokens, as far as
    the points go."""
    for number, (arm, (color, marker, dash)) in enumerate(looks.items()):
        places, means, widths = [], [], []
        for budget in budgets_of(points):
            found = gap(points, arm, budget) if arm in set(at_budget(points, budget)["arm"]) else None
            if found is not None:
                places.append(math.prod(budget) / 1e6 * 1.015 ** (number - len(looks) / 2))  # intervals side by side
                means.append(found.mean)
                widths.append(shown_width(found.half_width, found.count))
        style: dict[str, Any] = {"color": color, "marker": marker, "capsize": 2}
        if places:
            axis.errorbar(places, means, yerr=widths, linestyle="", **style)
        line = gap_trend(points, arm) if arm in folded_arms(points) else None
        if line is not None:
            ends = np.geomspace(line.lowest, line.highest, 20)
            axis.plot(ends / 1e6, [line.at(end)[0] for end in ends], color=color, linestyle=dash, linewidth=0.8)
    axis.set(xlabel="Training tokens (millions)", ylabel="Loss minus best\nfull softmax (nats)")
    values = [0.0, *(float(value) for line in axis.lines for value in np.asarray(line.get_ydata(), dtype=float))]
    # The paper's head is so far off that the others would be one line: what is beyond is in the table.
    axis.set_ylim(max(SHOWN_GAPS[0], min(values) - 0.03), min(SHOWN_GAPS[1], max(values) + 0.03))
    finish(axis)
    axis.axhline(0, color=GREY, linewidth=0.8)


def draw_step(axis: Axes, points: pd.DataFrame, looks: dict[str, Any], column: str, label: str) -> None:
    """One step's loss of each folded head minus that of the plain one with the same groups, over the seeds of both."""
    order = shared_order(points)
    if column not in points or order is None:
        axis.set_visible(False)
        return
    plain = PLAIN[order]
    for arm, (color, marker, dash) in looks.items():
        rows = points[points["arm"] == arm]
        if rows["partition_order"].iloc[0] != order:
            continue
        differences = {}
        for budget in budgets_of(rows):
            losses = at_budget(points, budget).pivot(index="seed", columns="arm", values=column)
            if plain in losses and (values := (losses[arm] - losses[plain]).dropna()).size:
                differences[math.prod(budget) / 1e6] = float(values.mean())
        if differences:
            axis.plot(list(differences), list(differences.values()), color=color, marker=marker, linestyle=dash)
    axis.set(xlabel="Training tokens (millions)", ylabel=f"{label} minus\n{plain} (nats)")
    finish(axis)


def shared_order(points: pd.DataFrame) -> str | None:
    """The order of groups in which several heads can be compared with a plain one, None where there is none."""
    if "partition_order" not in points:
        return None
    arms = points.drop_duplicates("arm").set_index("arm")["partition_order"]
    return next((order for order, plain in PLAIN.items() if plain in arms and (arms == order).sum() > 1), None)


def finish(axis: Axes) -> None:
    """A logarithmic x axis, or no panel where there is nothing to draw."""
    if axis.lines:
        axis.set_xscale("log")
        label_plainly(axis, "{x:g}")
    else:
        axis.set_visible(False)
