"""Which head to use: perplexity against what a head costs, at equal tokens, and loss against time.

results/CORPUS/heads_pareto.csv (losses: one training run a row), heads_pareto_curves.csv (losses on the way) and
heads_cost.csv (seconds, memory and FLOPs of all heads in one interleaved run) -> results/CORPUS/heads_pareto.png, .md

    python -m vocabfold.train --multirun experiment=heads_pareto
    python -m experiments heads_cost measure
    python -m experiments heads_pareto measure
    python -m experiments heads_pareto draw [CORPUS ...]
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from experiments.study.curves import read_curves
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, save, seeds_of, trained_on
from experiments.study.measuring import add_settings, collect_runs
from experiments.study.statistics import difference_over_seeds, mean_and_interval
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.measure.speed import ratio_summary, tokens_per_second
from vocabfold.runs.tables import RESULTS, read_rows, read_table

HEADS = {
    "full": ("full softmax, tied", COLORS["orange"], "s"),
    "full_untied": ("full softmax, untied", COLORS["orange"], "D"),
    "adaptive": ("adaptive softmax", COLORS["red"], "P"),
    "scale_shift_bpe": ("paper: scale and shift, bpe", GREY, "x"),
    "scale_shift_clustered": ("scale and shift, clustered", GREY, "+"),
    "low_rank_clustered": ("low rank, clustered", COLORS["purple"], "p"),
    "linear_tied": ("linear, tied, clustered", COLORS["green"], "<"),
    "linear_bpe": ("linear, bpe", COLORS["blue"], "v"),
    "linear_frequency": ("linear, frequency", COLORS["blue"], "o"),
    "linear_random": ("linear, random", COLORS["blue"], "1"),
    "linear_clustered": ("folded: linear, clustered", COLORS["green"], "^"),
    "shortlist_frequency": ("shortlist, frequency", COLORS["blue"], "*"),
    "shortlist_clustered": ("shortlist, clustered", COLORS["green"], "*"),
}
FULL = ("full", "full_untied")
NO_HEAD = "no_head"


add_options = add_settings


def measure(arguments: Namespace) -> None:
    """Gather the finished training runs into the table."""
    collect_runs("heads_pareto", arguments.settings)


def draw(corpus: str) -> None:
    """Write one corpus' picture and table."""
    heads = heads_of(read_table("heads_pareto", corpus), corpus)
    curves = timed_curves(corpus, heads)
    figure, axes = plt.subplots(2, 2, figsize=(2 * COLUMN_INCHES, 4.6))
    panels = {
        "head_flops_per_token": "FLOPs of the head per training token",
        "tokens_per_second": "Training tokens per second, whole step",
        "peak_memory_gib": "Peak training memory (GiB)",
    }
    for axis, (quantity, label) in zip(axes.flat, panels.items(), strict=False):
        draw_against(axis, heads, quantity, label)
    draw_over_time(axes[1, 1], curves)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=6)
    figure.suptitle(caption(corpus), fontsize=7)
    save(figure, RESULTS / corpus / "heads_pareto.png")
    path = RESULTS / corpus / "heads_pareto.md"
    write_text(path, markdown(corpus, heads, curves))
    print(f"wrote {path}")


@dataclass
class Trained:
    """One head: its mean loss over seeds with the half width of the 95% interval, and what its head costs."""

    loss: float
    half_width: float
    learning_rate: float
    group_accuracy: float
    seconds: list[float]  # of a training step, a round each
    tokens_per_second: float
    peak_memory_gib: float
    head_flops_per_token: float


def heads_of(table: pd.DataFrame, corpus: str) -> dict[str, Trained]:
    """The heads that were trained and timed. Raises UserError where nothing was timed."""
    path = RESULTS / corpus / "heads_cost.csv"
    if not path.is_file():
        raise UserError(f"{path} is missing: run `python -m experiments heads_cost measure` first")
    timed = read_rows(path)
    backbone_flops = float(timed.loc[timed["method"] == NO_HEAD, "flops_per_token"].iloc[0])
    heads = {}
    for head in HEADS:
        runs, steps = table[table["head"] == head], timed[timed["method"] == head]
        if runs.empty or steps.empty:
            continue
        mean, half_width = mean_and_interval(runs["validation_loss_nats"].tolist())
        seconds = steps.sort_values("round")["seconds"].tolist()
        heads[head] = Trained(
            loss=mean,
            half_width=half_width,
            learning_rate=float(runs["learning_rate"].iloc[0]),
            group_accuracy=float(runs["group_accuracy"].mean()),
            seconds=seconds,
            tokens_per_second=tokens_per_second(seconds, int(steps["tokens"].iloc[0])),
            peak_memory_gib=float(steps["peak_memory_gib"].iloc[0]),
            head_flops_per_token=float(steps["flops_per_token"].iloc[0]) - backbone_flops,
        )
    return heads


def timed_curves(corpus: str, heads: dict[str, Trained]) -> pd.DataFrame:
    """Validation losses on the way, with ``seconds``: steps at the speed of the interleaved run, so that what else a
    machine did while a run trained does not count."""
    curves = read_curves("heads_pareto", corpus).dropna(subset=["validation_loss_nats"])
    curves = curves[curves["head"].isin(heads.keys())]
    speed = {name: one.tokens_per_second for name, one in heads.items()}
    return curves.assign(seconds=curves["tokens"] / curves["head"].map(speed))


def draw_against(axis: Axes, heads: dict[str, Trained], quantity: str, label: str) -> None:
    """Perplexity with its interval against one cost, and a line through the heads that no other beats in both."""
    sign = -1 if quantity == "tokens_per_second" else 1
    cost = {name: float(getattr(one, quantity)) for name, one in heads.items()}
    for head, one in heads.items():
        name, color, marker = HEADS[head]
        low, middle, high = (math.exp(one.loss + part * one.half_width) for part in (-1, 0, 1))
        error = [[middle - low], [high - middle]]
        style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": "", "capsize": 2, "label": name}
        axis.errorbar(cost[head], middle, yerr=error, **style)
    best = [name for name in heads if not any(beats(heads, cost, other, name, sign) for other in heads)]
    best.sort(key=lambda name: cost[name])
    axis.plot([cost[name] for name in best], [math.exp(heads[name].loss) for name in best], color=GREY, zorder=0)
    axis.set(xscale="log", yscale="log", xlabel=label, ylabel="Validation perplexity")
    label_plainly(axis, "{x:g}" if max(cost.values()) < 1000 else EngFormatter(sep=""))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 8)))
    axis.yaxis.set_major_formatter("{x:.0f}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def label_plainly(axis: Axes, form: str | EngFormatter) -> None:
    """1, 2, 5, 10 ... on a logarithmic x axis, or 1, 3, 10 ... over more than two decades, where labels would touch."""
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1, 3)))
    axis.xaxis.set_major_formatter(form)
    axis.xaxis.set_minor_formatter(NullFormatter())


def beats(heads: dict[str, Trained], cost: dict[str, float], first: str, second: str, sign: int) -> bool:
    """Whether ``first`` costs less than ``second`` and loses less."""
    return sign * cost[first] < sign * cost[second] and heads[first].loss < heads[second].loss


def draw_over_time(axis: Axes, curves: pd.DataFrame) -> None:
    """Mean validation loss over seeds against training time."""
    for head, (_, color, marker) in HEADS.items():
        line = curves[curves["head"] == head].groupby("seconds")["validation_loss_nats"].mean()
        axis.plot(line.index, line.to_numpy(), color=color, marker=marker, linewidth=0.8)
    axis.set(xscale="log", xlabel="Training time (s)", ylabel="Validation loss (nats)")
    label_plainly(axis, "{x:g}")


def caption(corpus: str) -> str:
    """What was trained, how often."""
    table = read_table("heads_pareto", corpus)
    return f"{trained_on(table)}; {seeds_of(table)}, 95% intervals; {len(table)} runs"


def perplexity_ratio(table: pd.DataFrame, head: str, reference: str) -> tuple[float, float, float, float]:
    """Perplexity of ``head`` over that of ``reference``, paired by seed: (ratio, low, high of the 95% interval, p
    of a paired t-test)."""
    found = difference_over_seeds(table, "head", head, reference)
    return math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.p_value


def time_to_reach(curves: pd.DataFrame, head: str, loss: float) -> float:
    """Seconds until the mean loss of ``head`` is at most ``loss``, between evaluations by straight lines; NaN if
    it never is."""
    line = curves[curves["head"] == head].groupby("seconds")["validation_loss_nats"].mean()
    below = np.flatnonzero(line.to_numpy() <= loss)
    if not len(below):
        return float("nan")
    index = int(below[0])
    if index == 0:
        return float(line.index[0])
    seconds, losses = line.index[index - 1 : index + 1].to_numpy(), line.to_numpy()[index - 1 : index + 1]
    return float(seconds[0] + (losses[0] - loss) / (losses[0] - losses[1]) * (seconds[1] - seconds[0]))


def markdown(corpus: str, heads: dict[str, Trained], curves: pd.DataFrame) -> str:
    """One line a head, and what the best folded head reaches of what a user would want."""
    table = read_table("heads_pareto", corpus)
    full = min((name for name in FULL if name in heads), key=lambda name: heads[name].loss)
    best = min((name for name in heads if name not in (*FULL, "adaptive")), key=lambda name: heads[name].loss)
    seconds = {name: one.seconds for name, one in heads.items()}
    full_end = float(curves[curves["head"] == full]["seconds"].max())
    share = {name: time_to_reach(curves, name, heads[full].loss) / full_end for name in heads}
    lines = [
        "| head | learning rate | loss (nats) | perplexity / best full (95%) | p | group accuracy "
        "| tokens/s, best full = 1 | peak memory (GiB) | head FLOPs/token | time to best full's last loss |",
        "|---" * 10 + "|",
    ]
    for name, one in sorted(heads.items(), key=lambda item: item[1].loss):
        compared = "1 | "
        if name != full:
            ratio, low, high, p_value = perplexity_ratio(table, name, full)
            compared = f"{ratio:.3f} ({low:.3f} to {high:.3f}) | {p_value:.2g}"
        accuracy = "" if math.isnan(one.group_accuracy) else f"{one.group_accuracy:.3f}"
        reached = "never" if math.isnan(share[name]) else f"{share[name]:.2f}"
        lines.append(
            f"| {HEADS[name][0]} | {one.learning_rate:g} | {one.loss:.3f} ± {one.half_width:.3f} | {compared} "
            f"| {accuracy} | {ratio_summary(seconds, full, name).median:.2f} | {one.peak_memory_gib:.3f} "
            f"| {one.head_flops_per_token:,.0f} | {reached} |"
        )
    high = perplexity_ratio(table, best, full)[2]
    lines += [
        "",
        f"Best full softmax: {HEADS[full][0]}; best folded head: {HEADS[best][0]}.",
        "* Perplexity of the best folded head over that of the best full softmax, upper end of the 95% interval at "
        f"most 1.01: {high:.3f}, {'met' if high <= 1.01 else 'not met'}.",
        f"* The best full softmax's last loss in at most a third of its time: {share[best]:.2f}, "
        f"{'met' if share[best] <= 1 / 3 else 'not met'}.",
        "",
        f"{caption(corpus)}. Ratios are paired by seed (Student's t, paired t-test); speed and memory from one "
        "interleaved run (heads_cost). Learning rates: experiment learning_rates. Times: steps at the speed of that "
        "run.",
        "",
    ]
    return "\n".join(lines)
