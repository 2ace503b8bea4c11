"""Figure 3 of arXiv 2411.06371: memory and validation loss of the paper's head against group size.

    python -m vocabfold.train --multirun experiment=figure3_group_size
    python -m experiments figure3_group_size measure
    python -m experiments figure3_group_size draw [CORPUS ...]

results/CORPUS/figure3_group_size.csv and main_comparison.csv -> results/CORPUS/figure3_group_size.png, with the
published points (results/paper) and the memory at the paper's own size (figure3_simulated_memory) drawn in, and the
same in numbers, .md. On a text without main_comparison the full softmax comes from experiment=figure3_baseline, or is
left out. Of several budgets the largest is drawn.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, of_largest_budget, save, seeds_of, trained_on
from experiments.study.measuring import COST, add_settings, collect_runs, corpora_with_runs, corpus_of
from experiments.study.statistics import in_words, summarise
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.runs.record import collect
from vocabfold.runs.tables import RESULTS, read_rows, read_table

VOCABULARY_SIZE = 50_257
BASELINES = {
    "gpt2": ("GPT-2, full softmax", COLORS["green"], "--"),
    "gpt_neo": ("GPT-Neo, full softmax", COLORS["red"], ":"),
}
PANELS = [
    ("peak_memory_gib", "Peak training memory (GiB)", "figure3_memory", "memory_gb"),
    ("validation_loss_nats", "Validation loss (nats per token)", "figure3_val_loss", "val_loss_nats"),
]


add_options = add_settings


def measure(arguments: Namespace) -> None:
    """Gather the finished training runs into the table."""
    collect_runs("figure3_group_size", arguments.settings)
    corpora = [corpus_of(arguments.settings)] if arguments.settings else corpora_with_runs("figure3_group_size")
    for corpus in corpora:
        if any((RESULTS / "runs" / corpus / "figure3_baseline").glob("*/row.json")):
            print(f"wrote {collect('figure3_baseline', corpus)}")


def draw(corpus: str) -> None:
    """Write one corpus' figure and table."""
    folded, full = read_runs(corpus)
    figure, axes = plt.subplots(1, 2, figsize=(2 * COLUMN_INCHES, 2.8), sharex=True)
    for axis, (column, label, published, published_column) in zip(axes, PANELS, strict=True):
        draw_published(axis, published, published_column)
        draw_ours(axis, folded, column)
        draw_baselines(axis, full, column)
        draw_root(axis)
        axis.set(xscale="log", ylabel=label, xlabel="Group size S (slots a group)")
        axis.xaxis.set_major_locator(FixedLocator([14, 56, 225, 900, 3600]))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
    draw_simulated(axes[0])
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_locator(FixedLocator([0.05, 0.1, 0.2, 0.5, 1, 2]))
    axes[0].yaxis.set_major_formatter(ScalarFormatter())
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    handles, labels = axes[0].get_legend_handles_labels()
    handles, labels = in_columns(handles, labels, 3)
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    seeds = seeds_of(folded) + (", 95% intervals" if folded["seed"].nunique() > 1 else "")
    figure.suptitle(f"{trained_on(folded)}; {seeds}; {len(folded) + len(full)} runs", fontsize=7)
    save(figure, RESULTS / corpus / "figure3_group_size.png")
    path = RESULTS / corpus / "figure3_group_size.md"
    write_text(path, markdown(folded, full))
    print(f"wrote {path}")


def read_runs(corpus: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(runs with the paper's head, runs with the full softmax) of one hidden size and budget, the largest: the latter
    those of main_comparison, of figure3_baseline on a text that has none, or none where neither was trained."""
    folded = of_largest_budget(read_table("figure3_group_size", corpus))
    tables = [name for name in ("main_comparison", "figure3_baseline") if (RESULTS / corpus / f"{name}.csv").is_file()]
    if not tables:
        return folded, folded.iloc[:0]
    full = read_table(tables[0], corpus).query("head == 'full'")
    return folded, full[full["hidden_size"].isin(folded["hidden_size"])]


def draw_root(axis: Axes) -> None:
    """Where the published text expects the least memory: sqrt V."""
    root = VOCABULARY_SIZE**0.5
    axis.axvline(root, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
    axis.text(root, 1.01, "√V", transform=axis.get_xaxis_transform(), ha="center", fontsize=7, color=GREY)


def in_columns(handles: list[Any], labels: list[str], columns: int) -> tuple[list[Any], list[str]]:
    """Legend entries reordered so that matplotlib, which fills columns first, reads row by row, ours first."""
    entries = sorted(zip(handles, labels, strict=True), key=lambda entry: (not entry[1].startswith("ours"), entry[1]))
    entries = [entry for column in range(columns) for entry in entries[column::columns]]
    return [handle for handle, _ in entries], [label for _, label in entries]


def draw_published(axis: Axes, name: str, column: str) -> None:
    """The authors' own points."""
    published = read_published(name, column)
    label = "published (memory in GB)"
    axis.plot(published["group_size"], published["mean"], color=GREY, marker=".", label=label, linewidth=0.8)


def draw_simulated(axis: Axes) -> None:
    """The paper's head at the batch and sequence length of the published curve."""
    table = read_simulated()
    shape = f"{table['batch_size'].iloc[0]} x {table['sequence_length'].iloc[0]}"
    label = f"ours, simulated at {shape}"
    axis.plot(table["group_size"], table["peak_gib"], color=COLORS["purple"], linestyle="-.", label=label)


def read_published(name: str, column: str) -> pd.DataFrame:
    """group_size and, as ``mean``, ``column`` of one published curve."""
    table = read_reference(RESULTS / "paper" / f"{name}.csv", "restore it from the repository")
    return table.rename(columns={column: "mean"})


def read_simulated() -> pd.DataFrame:
    """The paper's head's rows of the simulated table."""
    path = COST / "figure3_simulated_memory.csv"
    return read_reference(path, "run `python -m experiments figure3_simulated_memory measure` first").query(
        "head != 'full'"
    )


def read_reference(path: Path, remedy: str) -> pd.DataFrame:
    """A table that is drawn beside ours. Raises UserError where it is missing."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {remedy}")
    return read_rows(path)


def draw_ours(axis: Axes, folded: pd.DataFrame, column: str) -> None:
    """Means over seeds with 95% intervals."""
    ours = summarise(folded, ["group_size"], column)
    axis.errorbar(
        ours["group_size"],
        ours["mean"],
        ours["half_width"],
        color=COLORS["blue"],
        marker="o",
        capsize=2,
        label="ours, the paper's head",
    )


def draw_baselines(axis: Axes, full: pd.DataFrame, column: str) -> None:
    """A line and a 95% band for each model with the full softmax."""
    for _, row in summarise(full, ["model"], column).iterrows():
        name, color, dash = BASELINES[row["model"]]
        axis.axhline(row["mean"], color=color, linestyle=dash, label=name)
        axis.axhspan(
            row["mean"] - row["half_width"], row["mean"] + row["half_width"], color=color, alpha=0.15, linewidth=0
        )


def markdown(folded: pd.DataFrame, full: pd.DataFrame) -> str:
    """One corpus in numbers: means and 95% intervals over seeds, extremes, and how the shapes follow the published."""
    first = folded.iloc[0]
    lines = [f"{trained_on(folded)} ({first['tokens']:,}).", ""]
    lines += ["| S | validation loss (nats) | group accuracy | peak memory (GiB) | seeds |", "|---|---|---|---|---|"]
    loss, accuracy, memory = (
        summarise(folded, ["group_size"], column)
        for column in ("validation_loss_nats", "group_accuracy", "peak_memory_gib")
    )
    means = zip(loss.iterrows(), accuracy["mean"], memory["mean"], strict=True)
    for (_, row), share, peak_gib in means:
        interval = in_words(row["mean"], row["half_width"])
        lines.append(f"| {row['group_size']:,.0f} | {interval} | {share:.3f} | {peak_gib:.4f} | {row['seeds']:.0f} |")
    for _, baseline in summarise(full, ["model"], "validation_loss_nats").iterrows():
        peak_gib = full.loc[full["model"] == baseline["model"], "peak_memory_gib"].mean()
        interval = in_words(baseline["mean"], baseline["half_width"])
        lines.append(f"| {BASELINES[baseline['model']][0]} | {interval} | | {peak_gib:.4f} | {baseline['seeds']} |")
    hump, basin = compare_loss(folded), compare_memory()
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


def compare_loss(folded: pd.DataFrame) -> Compared:
    """The mean validation loss, and where it is worst."""
    ours = summarise(folded, ["group_size"], "validation_loss_nats")
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
