"""A trained full softmax, folded at once and distilled: perplexity against the tokens distilled on.

    python -m vocabfold.train --multirun experiment=fold start.run=results/runs/CORPUS/main_comparison/RUN
    python -m experiments fold measure
    python -m experiments fold draw [CORPUS ...]

results/CORPUS/fold.csv -> results/CORPUS/fold.png and .md. The rows are foldings of main_comparison's full softmaxes.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, save
from experiments.study.measuring import add_settings, collect_runs
from experiments.study.statistics import mean_and_interval, summarise
from vocabfold.files import write_text
from vocabfold.runs.tables import RESULTS, read_table

PARTITION = ["partition_order", "shortlist"]
ORDERS = {
    "bpe": ("BPE order", COLORS["orange"], "s"),
    "frequency": ("frequency", COLORS["blue"], "o"),
    "clustered": ("clustered by the teacher's embedding", COLORS["green"], "^"),
    "random": ("random", COLORS["purple"], "v"),
}
PANELS = {"perplexity": "Validation perplexity", "lost_nats": "Above the teacher (nats per token)"}


add_options = add_settings


def measure(arguments: Namespace) -> None:
    """Gather the finished training runs into the table."""
    collect_runs("fold", arguments.settings)


def draw(corpus: str) -> None:
    """Write one corpus' picture and table."""
    table = read_table("fold", corpus)
    points = points_of(table)
    lengths = sorted(points["distillation_tokens"].unique())
    places = {tokens: place for place, tokens in enumerate(lengths)}
    figure, axes = plt.subplots(1, 2, figsize=(2 * COLUMN_INCHES, 2.8))
    for axis, (quantity, label) in zip(axes, PANELS.items(), strict=True):
        summary = summarise(points, [*PARTITION, "distillation_tokens"], quantity)
        partitions = summary.groupby(PARTITION)
        for index, (partition, rows) in enumerate(partitions):
            _, color, marker = ORDERS[str(partition[0])]
            # Beside each other, so that no interval hides another.
            x = rows["distillation_tokens"].map(places) + 0.03 * (index - (len(partitions) - 1) / 2)
            dash = "--" if partition[1] else "-"
            axis.errorbar(
                x,
                rows["mean"],
                rows["half_width"],
                color=color,
                marker=marker,
                ls=dash,
                capsize=2,
                label=name_of(partition),
            )
        axis.set_xticks(range(len(lengths)), [f"{tokens:,}" if tokens else "at once" for tokens in lengths])
        axis.set(xlabel="Tokens distilled on", ylabel=label)
    axes[0].axhline(
        table.drop_duplicates("seed")["teacher_perplexity"].mean(),
        color=GREY,
        linestyle=":",
        label="teacher: full softmax",
    )
    axes[1].set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    first, seeds = table.iloc[0], table["seed"].nunique()
    teachers = f"{seeds} teachers, 95% intervals" if seeds > 1 else "one teacher"
    figure.suptitle(
        f"{first['corpus']}; hidden {first['hidden_size']}, {first['num_layers']} layers; {teachers}", fontsize=7
    )
    save(figure, RESULTS / corpus / "fold.png")
    path = RESULTS / corpus / "fold.md"
    write_text(path, markdown(table, points))
    print(f"wrote {path}")


def points_of(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each teacher, partition and number of distillation tokens, "at once" as 0 tokens, with ``lost_nats``:
    what it has above its own teacher."""
    at_once = table.assign(
        distillation_tokens=0,
        validation_loss_nats=table["at_once_loss_nats"],
        perplexity=table["at_once_perplexity"],
    )
    points = pd.concat([table, at_once]).drop_duplicates([*PARTITION, "seed", "distillation_tokens"])
    return points.assign(lost_nats=points["validation_loss_nats"] - points["teacher_loss_nats"])


def name_of(partition: Sequence[Any]) -> str:
    """The label of an (order, shortlist)."""
    return ORDERS[partition[0]][0] + (f", shortlist {partition[1]:,}" if partition[1] else "")


def markdown(table: pd.DataFrame, points: pd.DataFrame) -> str:
    """Means and 95% intervals over teachers, one line an partition and number of tokens."""
    lines = [
        "| partition | groups | tokens distilled on | perplexity | loss above the teacher's (nats) | teachers |",
        "|---|---|---|---|---|---|",
    ]
    for (order, shortlist, tokens), rows in points.groupby([*PARTITION, "distillation_tokens"]):
        lines.append(
            f"| {name_of((order, shortlist))} | {rows['num_groups'].iloc[0]:,} | {tokens:,} | "
            f"{interval(rows['perplexity'], 2)} | {interval(rows['lost_nats'], 4)} | {len(rows)} |"
        )
    teachers = table.drop_duplicates("seed")["teacher_perplexity"]
    first = table.iloc[0]
    return "\n".join(
        [
            *lines,
            "",
            f"Teacher's perplexity: {interval(teachers, 2)}. 0 tokens: the closed form at once, fitted on "
            f"{first['start_tokens']:,} hidden states.",
            f"Corpus {first['corpus']}; learning rate {first['learning_rate']:g}; mean ± 95% interval (Student's t) "
            "over teachers where there are several.",
            f"Hardware: {first['hardware']}; torch {first['torch']}.",
            "",
        ]
    )


def interval(values: pd.Series, digits: int) -> str:
    """Mean ± half width, or the one value there is."""
    mean, half_width = mean_and_interval(values.tolist())
    return f"{mean:.{digits}f}" + (f" ± {half_width:.{digits}f}" if len(values) > 1 else "")
