"""Figure 3 of arXiv 2411.06371: memory and validation loss of the grouped head against group size.

results/SCALE/figure3_group_size.csv and main_comparison.csv -> results/SCALE/figure3_group_size.png, with the published
points (results/paper) and the memory at the paper's own size (results/simulated) drawn in, and the same in numbers,
results/SCALE/figure3_group_size.md. Each corpus has a row of panels; the full softmax on a second corpus comes from
figure3_baseline.csv.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, draw_for_scales, save
from experiments.study.statistics import summarise
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.runs.record import RESULTS, read_table

VOCABULARY_SIZE = 50_257
BASELINES = {
    "gpt2": ("GPT-2, full softmax", COLORS["green"], "--"),
    "gpt_neo": ("GPT-Neo, full softmax", COLORS["red"], ":"),
}
PANELS = [
    ("peak_memory_gib", "Peak training memory (GiB)", "figure3_memory", "memory_gb"),
    ("validation_loss_nats", "Validation loss (nats per token)", "figure3_val_loss", "val_loss_nats"),
]


def draw(scale: str) -> None:
    """Draw one scale's figure."""
    grouped, full = read_runs(scale)
    corpora = corpora_of(grouped, full)
    size = (2 * COLUMN_INCHES, 0.8 + 2.0 * len(corpora))
    figure, axes = plt.subplots(len(corpora), 2, figsize=size, sharex=True, squeeze=False)
    for axis, (_, _, published, column) in zip(axes[0], PANELS, strict=True):  # the authors' text was one
        draw_published(axis, published, column)
    for row, corpus in zip(axes, corpora, strict=True):
        draw_corpus(row, grouped[grouped["corpus"] == corpus], full[full["corpus"] == corpus])
        row[1].set_title(corpus if len(corpora) > 1 else "", loc="right", fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("Group size S (slots a group)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles, labels = in_columns(handles, labels, 3)
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(caption(grouped, full), fontsize=7)
    save(figure, RESULTS / scale / "figure3_group_size.png")
    path = RESULTS / scale / "figure3_group_size.md"
    parts = [(grouped[grouped["corpus"] == name], full[full["corpus"] == name]) for name in corpora]
    write_text(path, "\n".join(markdown(*part) for part in parts))
    print(f"wrote {path}")


def read_runs(scale: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(grouped, full softmax) runs of one hidden size, of every corpus."""
    grouped = read_table("figure3_group_size", scale)
    full = read_table("main_comparison", scale).query("head == 'full'")
    if (RESULTS / scale / "figure3_baseline.csv").is_file():
        full = pd.concat([full, read_table("figure3_baseline", scale)], ignore_index=True)
    return grouped, full[full["hidden_size"].isin(grouped["hidden_size"]) & full["corpus"].isin(grouped["corpus"])]


def corpora_of(grouped: pd.DataFrame, full: pd.DataFrame) -> list[str]:
    """Those of main_comparison first."""
    main = set(full.loc[full["experiment"] == "main_comparison", "corpus"])
    return sorted(grouped["corpus"].unique(), key=lambda corpus: (corpus not in main, corpus))


def draw_corpus(axes: Sequence[Axes], grouped: pd.DataFrame, full: pd.DataFrame) -> None:
    """One corpus: memory and loss."""
    for axis, (column, label, _, _) in zip(axes, PANELS, strict=True):
        draw_ours(axis, grouped, column)
        draw_baselines(axis, full, column)
        axis.axvline(VOCABULARY_SIZE**0.5, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
        axis.set(xscale="log", ylabel=label)
        axis.xaxis.set_major_locator(FixedLocator([14, 56, 225, 900, 3600]))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.text(
            VOCABULARY_SIZE**0.5, 1.01, "√V", transform=axis.get_xaxis_transform(), ha="center", fontsize=7, color=GREY
        )
    draw_simulated(axes[0])
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_locator(FixedLocator([0.05, 0.1, 0.2, 0.5, 1, 2]))
    axes[0].yaxis.set_major_formatter(ScalarFormatter())
    axes[0].yaxis.set_minor_formatter(NullFormatter())


def in_columns(handles: list[Any], labels: list[str], columns: int) -> tuple[list[Any], list[str]]:
    """Legend entries reordered so that matplotlib, which fills columns first, reads row by row, ours first."""
    entries = sorted(zip(handles, labels, strict=True), key=lambda entry: (not entry[1].startswith("ours"), entry[1]))
    entries = [entry for column in range(columns) for entry in entries[column::columns]]
    return [handle for handle, _ in entries], [label for _, label in entries]


def draw_published(axis: Axes, name: str, column: str) -> None:
    """The authors' own points."""
    published = read_published(name, column)
    label = "published, grouped (memory in GB)"
    axis.plot(published["group_size"], published["mean"], color=GREY, marker=".", label=label, linewidth=0.8)


def draw_simulated(axis: Axes) -> None:
    """Our grouped head at the batch and sequence length of the published curve."""
    table = read_simulated()
    shape = f"{table['batch_size'].iloc[0]} x {table['sequence_length'].iloc[0]}"
    label = f"ours, grouped, simulated at {shape}"
    axis.plot(table["group_size"], table["peak_gib"], color=COLORS["purple"], linestyle="-.", label=label)


def read_published(name: str, column: str) -> pd.DataFrame:
    """group_size and, as ``mean``, ``column`` of one published curve."""
    table = read_reference(RESULTS / "paper" / f"{name}.csv", "restore it from the repository")
    return table.rename(columns={column: "mean"})


def read_simulated() -> pd.DataFrame:
    """The grouped head's rows of the simulated table."""
    path = RESULTS / "simulated" / "figure3_simulated_memory.csv"
    return read_reference(path, "run experiments/paper/figure3_simulated_memory.py first").query("head == 'grouped'")


def read_reference(path: Path, remedy: str) -> pd.DataFrame:
    """A table that is drawn beside ours. Raises UserError where it is missing."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {remedy}")
    return pd.read_csv(path)


def draw_ours(axis: Axes, grouped: pd.DataFrame, column: str) -> None:
    """Means over seeds with 95% intervals."""
    ours = summarise(grouped, ["group_size"], column)
    axis.errorbar(
        ours["group_size"],
        ours["mean"],
        ours["half_width"],
        color=COLORS["blue"],
        marker="o",
        capsize=2,
        label="ours, grouped",
    )


def draw_baselines(axis: Axes, full: pd.DataFrame, column: str) -> None:
    """A line and a 95% band for each model with the full softmax."""
    for _, row in summarise(full, ["model"], column).iterrows():
        name, color, dash = BASELINES[row["model"]]
        axis.axhline(row["mean"], color=color, linestyle=dash, label=name)
        axis.axhspan(
            row["mean"] - row["half_width"], row["mean"] + row["half_width"], color=color, alpha=0.15, linewidth=0
        )


def markdown(grouped: pd.DataFrame, full: pd.DataFrame) -> str:
    """One corpus in numbers: means and 95% intervals over seeds, extremes, and how the shapes follow the published."""
    first = grouped.iloc[0]
    lines = [f"Corpus {first['corpus']}, {first['tokens']:,} tokens.", ""]
    lines += ["| S | validation loss (nats) | group accuracy | peak memory (GiB) | seeds |", "|---|---|---|---|---|"]
    loss, accuracy, memory = (
        summarise(grouped, ["group_size"], column)
        for column in ("validation_loss_nats", "group_accuracy", "peak_memory_gib")
    )
    means = zip(loss.itertuples(), accuracy["mean"], memory["mean"], strict=True)
    for row, share, peak_gib in means:
        interval = f"{row.mean:.3f} ± {row.half_width:.3f}"
        lines.append(f"| {row.group_size:,} | {interval} | {share:.3f} | {peak_gib:.4f} | {row.seeds} |")
    for _, baseline in summarise(full, ["model"], "validation_loss_nats").iterrows():
        peak_gib = full.loc[full["model"] == baseline["model"], "peak_memory_gib"].mean()
        interval = f"{baseline['mean']:.3f} ± {baseline['half_width']:.3f}"
        lines.append(f"| {BASELINES[baseline['model']][0]} | {interval} | | {peak_gib:.4f} | {baseline['seeds']} |")
    hump, basin = compare_loss(grouped), compare_memory()
    measured = memory.sort_values("mean").iloc[0]
    return "\n".join(
        [
            *lines,
            "",
            f"* Worst loss: S = {hump.ours['group_size']:,.0f}, {hump.ours['mean']:.3f} nats; published: "
            f"S = {hump.published['group_size']:,.0f}, {hump.published['mean']:.3f} nats.",
            f"* Least memory measured: S = {measured['group_size']:,.0f}, {measured['mean']:.3f} GiB; the two logit "
            f"tensors alone, N x S and N x G, are smallest at S = √V = {VOCABULARY_SIZE**0.5:.0f}.",
            f"* Least memory at the published batch, simulated: S = {basin.ours['group_size']:,.0f}, "
            f"{basin.ours['mean']:.3f} GiB; published: S = {basin.published['group_size']:,.0f}, "
            f"{basin.published['mean']:.2f} GB.",
            "* Correlation with the published curve over our group sizes: simulated memory "
            f"{basin.correlation:.3f}, validation loss {hump.correlation:.3f}.",
            "",
        ]
    )


@dataclass(frozen=True)
class Compared:
    """A curve (columns group_size and mean) beside the published one: both extremes, and the correlation."""

    curve: pd.DataFrame
    ours: pd.Series
    published: pd.Series
    correlation: float


def compare_loss(grouped: pd.DataFrame) -> Compared:
    """The mean validation loss, and where it is worst."""
    ours = summarise(grouped, ["group_size"], "validation_loss_nats")
    published = read_published("figure3_val_loss", "val_loss_nats")
    worst, published_worst = (curve.sort_values("mean").iloc[-1] for curve in (ours, published))
    return Compared(ours, worst, published_worst, correlation(ours, published))


def compare_memory() -> Compared:
    """The simulated memory at the published batch, and where it is least."""
    ours = read_simulated().rename(columns={"peak_gib": "mean"})
    published = read_published("figure3_memory", "memory_gb")
    least, published_least = (curve.sort_values("mean").iloc[0] for curve in (ours, published))
    return Compared(ours, least, published_least, correlation(ours, published))


def correlation(ours: pd.DataFrame, published: pd.DataFrame) -> float:
    """Pearson's, with the published points interpolated in log S at our group sizes."""
    sizes = np.log(ours["group_size"].to_numpy(dtype=float))
    there = np.interp(sizes, np.log(published["group_size"].to_numpy(dtype=float)), published["mean"])
    return float(np.corrcoef(ours["mean"], there)[0, 1])


def caption(grouped: pd.DataFrame, full: pd.DataFrame) -> str:
    """What was trained, in one line."""
    first = grouped.iloc[0]
    budgets = grouped.groupby("corpus", sort=False)["tokens"].first()
    corpora = " and ".join(f"{corpus}, {tokens / 1e6:.2f} M tokens" for corpus, tokens in budgets.items())
    return (
        f"{corpora}; hidden {first['hidden_size']}, {first['num_layers']} layers; {grouped['seed'].nunique()} seeds, "
        f"95% intervals; {len(grouped) + len(full)} runs"
    )


if __name__ == "__main__":
    draw_for_scales("figure3_group_size", draw)()
