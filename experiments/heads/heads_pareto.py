"""Which head to use: perplexity against what a head costs, at equal tokens, and loss against time.

results/SCALE/heads_pareto.csv (losses: one training run a row), heads_pareto_curves.csv (losses on the way) and
heads_cost.csv (seconds, memory and FLOPs of all heads in one interleaved run) -> results/SCALE/heads_pareto.png, .md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from experiments.study.curves import read_curves
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, draw_for_scales, save, seeds_of
from experiments.study.statistics import difference_over_seeds, mean_and_interval
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.measure.speed import ratio_summary, tokens_per_second
from vocabfold.runs.record import RESULTS, read_table

CONTENDERS = {
    "full_tied": ("full softmax, tied", COLORS["orange"], "s"),
    "full_free": ("full softmax, free rows", COLORS["orange"], "D"),
    "adaptive": ("adaptive softmax", COLORS["red"], "P"),
    "scale_shift_bpe": ("paper: scale and shift, bpe", GREY, "x"),
    "scale_shift_clustered": ("scale and shift, clustered", GREY, "+"),
    "low_rank_clustered": ("low rank, clustered", COLORS["purple"], "p"),
    "linear_tied": ("linear, tied, clustered", COLORS["green"], "<"),
    "linear_bpe": ("linear, bpe", COLORS["blue"], "v"),
    "linear_frequency": ("linear, frequency", COLORS["blue"], "o"),
    "linear_random": ("linear, random", COLORS["blue"], "1"),
    "linear_clustered": ("linear, clustered", COLORS["green"], "^"),
    "shortlist_frequency": ("shortlist, frequency", COLORS["blue"], "*"),
    "shortlist_clustered": ("shortlist, clustered", COLORS["green"], "*"),
}
FULL = ("full_tied", "full_free")
FREE = "free"


def draw(scale: str) -> None:
    """Write one scale's picture and table."""
    arms = arms_of(read_table("heads_pareto", scale), scale)
    curves = timed_curves(scale, arms)
    figure, axes = plt.subplots(2, 2, figsize=(2 * COLUMN_INCHES, 4.6))
    panels = {
        "head_flops_per_token": "FLOPs of the head per training token",
        "tokens_per_second": "Training tokens per second, whole step",
        "peak_memory_gib": "Peak training memory (GiB)",
    }
    for axis, (quantity, label) in zip(axes.flat, panels.items(), strict=False):
        draw_against(axis, arms, quantity, label)
    draw_over_time(axes[1, 1], curves)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=6)
    figure.suptitle(caption(scale), fontsize=7)
    save(figure, RESULTS / scale / "heads_pareto.png")
    path = RESULTS / scale / "heads_pareto.md"
    write_text(path, markdown(scale, arms, curves))
    print(f"wrote {path}")


@dataclass
class Arm:
    """One contender: its mean loss over seeds with the half width of the 95% interval, and what its head costs."""

    loss: float
    half_width: float
    learning_rate: float
    group_accuracy: float
    seconds: list[float]  # of a training step, a round each
    tokens_per_second: float
    peak_memory_gib: float
    head_flops_per_token: float


def arms_of(table: pd.DataFrame, scale: str) -> dict[str, Arm]:
    """The contenders that were trained and timed. Raises UserError where nothing was timed."""
    path = RESULTS / scale / "heads_cost.csv"
    if not path.is_file():
        raise UserError(f"{path} is missing: run `make everything SCALE={scale}` first")
    timed = pd.read_csv(path)
    free_flops = float(timed.loc[timed["side"] == FREE, "flops_per_token"].iloc[0])
    arms = {}
    for contender in CONTENDERS:
        runs, steps = table[table["contender"] == contender], timed[timed["side"] == contender]
        if runs.empty or steps.empty:
            continue
        mean, half_width = mean_and_interval(runs["validation_loss_nats"].tolist())
        seconds = steps.sort_values("round")["seconds"].tolist()
        arms[contender] = Arm(
            loss=mean,
            half_width=half_width,
            learning_rate=float(runs["learning_rate"].iloc[0]),
            group_accuracy=float(runs["group_accuracy"].mean()),
            seconds=seconds,
            tokens_per_second=tokens_per_second(seconds, int(steps["tokens"].iloc[0])),
            peak_memory_gib=float(steps["peak_memory_gib"].iloc[0]),
            head_flops_per_token=float(steps["flops_per_token"].iloc[0]) - free_flops,
        )
    return arms


def timed_curves(scale: str, arms: dict[str, Arm]) -> pd.DataFrame:
    """Validation losses on the way, with ``seconds``: steps at the speed of the interleaved run, so that what else a
    machine did while a run trained does not count."""
    curves = read_curves("heads_pareto", scale).dropna(subset=["validation_loss_nats"])
    curves = curves[curves["contender"].isin(arms.keys())]
    speed = {name: arm.tokens_per_second for name, arm in arms.items()}
    return curves.assign(seconds=curves["tokens"] / curves["contender"].map(speed))


def draw_against(axis: Axes, arms: dict[str, Arm], quantity: str, label: str) -> None:
    """Perplexity with its interval against one cost, and a line through the heads that no other beats in both."""
    sign = -1 if quantity == "tokens_per_second" else 1
    cost = {name: float(getattr(arm, quantity)) for name, arm in arms.items()}
    for contender, arm in arms.items():
        name, color, marker = CONTENDERS[contender]
        low, middle, high = (math.exp(arm.loss + part * arm.half_width) for part in (-1, 0, 1))
        error = [[middle - low], [high - middle]]
        style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": "", "capsize": 2, "label": name}
        axis.errorbar(cost[contender], middle, yerr=error, **style)
    best = [name for name in arms if not any(beats(arms, cost, other, name, sign) for other in arms)]
    best.sort(key=lambda name: cost[name])
    axis.plot([cost[name] for name in best], [math.exp(arms[name].loss) for name in best], color=GREY, zorder=0)
    axis.set(xscale="log", yscale="log", xlabel=label, ylabel="Validation perplexity")
    label_plainly(axis, "{x:g}" if max(cost.values()) < 1000 else EngFormatter(sep=""))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 8)))
    axis.yaxis.set_major_formatter("{x:.0f}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def label_plainly(axis: Axes, form: str | EngFormatter) -> None:
    """1, 2, 5, 10 ... on a logarithmic x axis."""
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(form)
    axis.xaxis.set_minor_formatter(NullFormatter())


def beats(arms: dict[str, Arm], cost: dict[str, float], first: str, second: str, sign: int) -> bool:
    """Whether ``first`` costs less than ``second`` and loses less."""
    return sign * cost[first] < sign * cost[second] and arms[first].loss < arms[second].loss


def draw_over_time(axis: Axes, curves: pd.DataFrame) -> None:
    """Mean validation loss over seeds against training time."""
    for contender, (_, color, marker) in CONTENDERS.items():
        line = curves[curves["contender"] == contender].groupby("seconds")["validation_loss_nats"].mean()
        axis.plot(line.index, line.to_numpy(), color=color, marker=marker, linewidth=0.8)
    axis.set(xscale="log", xlabel="Training time (s)", ylabel="Validation loss (nats)")
    label_plainly(axis, "{x:g}")


def caption(scale: str) -> str:
    """What was trained, how often."""
    table = read_table("heads_pareto", scale)
    first = table.iloc[0]
    return (
        f"{first['corpus']}, {first['tokens'] / 1e6:.2f} M tokens, hidden {first['hidden_size']}; "
        f"{seeds_of(table)}, 95% intervals; {len(table)} runs"
    )


def perplexity_ratio(table: pd.DataFrame, contender: str, reference: str) -> tuple[float, float, float, float]:
    """Perplexity of ``contender`` over that of ``reference``, paired by seed: (ratio, low, high of the 95% interval, p
    of a paired t-test)."""
    found = difference_over_seeds(table, "contender", contender, reference)
    return math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.p_value


def time_to_reach(curves: pd.DataFrame, contender: str, loss: float) -> float:
    """Seconds until the mean loss of ``contender`` is at most ``loss``, between evaluations by straight lines; NaN if
    it never is."""
    line = curves[curves["contender"] == contender].groupby("seconds")["validation_loss_nats"].mean()
    below = np.flatnonzero(line.to_numpy() <= loss)
    if not len(below):
        return float("nan")
    index = int(below[0])
    if index == 0:
        return float(line.index[0])
    seconds, losses = line.index[index - 1 : index + 1].to_numpy(), line.to_numpy()[index - 1 : index + 1]
    return float(seconds[0] + (losses[0] - loss) / (losses[0] - losses[1]) * (seconds[1] - seconds[0]))


def markdown(scale: str, arms: dict[str, Arm], curves: pd.DataFrame) -> str:
    """One line a head, and what the best folded head reaches of what a user would want."""
    table = read_table("heads_pareto", scale)
    full = min((name for name in FULL if name in arms), key=lambda name: arms[name].loss)
    best = min((name for name in arms if name not in (*FULL, "adaptive")), key=lambda name: arms[name].loss)
    seconds = {name: arm.seconds for name, arm in arms.items()}
    full_end = float(curves[curves["contender"] == full]["seconds"].max())
    share = {name: time_to_reach(curves, name, arms[full].loss) / full_end for name in arms}
    lines = [
        "| head | learning rate | loss (nats) | perplexity / best full (95%) | p | group accuracy "
        "| tokens/s, best full = 1 | peak memory (GiB) | head FLOPs/token | time to best full's last loss |",
        "|---" * 10 + "|",
    ]
    for name, arm in sorted(arms.items(), key=lambda item: item[1].loss):
        compared = "1 | "
        if name != full:
            ratio, low, high, p_value = perplexity_ratio(table, name, full)
            compared = f"{ratio:.3f} ({low:.3f} to {high:.3f}) | {p_value:.2g}"
        accuracy = "" if math.isnan(arm.group_accuracy) else f"{arm.group_accuracy:.3f}"
        reached = "never" if math.isnan(share[name]) else f"{share[name]:.2f}"
        lines.append(
            f"| {CONTENDERS[name][0]} | {arm.learning_rate:g} | {arm.loss:.3f} ± {arm.half_width:.3f} | {compared} "
            f"| {accuracy} | {ratio_summary(seconds, full, name).median:.2f} | {arm.peak_memory_gib:.3f} "
            f"| {arm.head_flops_per_token:,.0f} | {reached} |"
        )
    high = perplexity_ratio(table, best, full)[2]
    lines += [
        "",
        f"Best full softmax: {CONTENDERS[full][0]}; best folded head: {CONTENDERS[best][0]}.",
        "* Perplexity of the best folded head over that of the best full softmax, upper end of the 95% interval at "
        f"most 1.01: {high:.3f}, {'met' if high <= 1.01 else 'not met'}.",
        f"* The best full softmax's last loss in at most a third of its time: {share[best]:.2f}, "
        f"{'met' if share[best] <= 1 / 3 else 'not met'}.",
        "",
        f"{caption(scale)}. Ratios are paired by seed (Student's t, paired t-test); speed and memory from one "
        "interleaved run (heads_cost). Learning rates: experiment learning_rates. Times: steps at the speed of that "
        "run.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    draw_for_scales("heads_pareto", draw)()
