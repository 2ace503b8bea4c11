"""Perplexity against compression of the input embedding: compressed after training, after recovery, and from scratch.

    python -m vocabfold.train --multirun experiment=embedding_compression
    python -m experiments embedding_compression measure
    python -m experiments embedding_compression draw [CORPUS ...]

results/CORPUS/embedding_compression.csv -> results/CORPUS/embedding_compression.png and .md.
"""

from __future__ import annotations

import math
from argparse import Namespace

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats

from experiments.embeddings.methods import LOOKS, PUBLISHED, with_settings
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, save, trained_on
from experiments.study.measuring import add_settings, collect_runs
from experiments.study.statistics import mean_and_interval
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.runs.tables import RESULTS, read_table

STAGES = {"compressed": "Compressed after training", "recovered": "and trained on", "scratch": "From scratch"}
SETTING = ["stage", "embedding", "embedding_setting"]
ONE_PERCENT = math.log(1.01)


add_options = add_settings


def measure(arguments: Namespace) -> None:
    """Gather the finished training runs into the table."""
    collect_runs("embedding_compression", arguments.settings)


def draw(corpus: str) -> None:
    """Write one corpus' picture and table."""
    table = with_differences(read_table("embedding_compression", corpus))
    stages = [stage for stage in STAGES if (table["stage"] == stage).any()]
    size = (COLUMN_INCHES * 2, 2.5)
    figure, axes = plt.subplots(1, len(stages), figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        draw_stage(axis, table[table["stage"] == stage])
        axis.set_title(STAGES[stage], fontsize=8)
        axis.set_xlabel("Compression of the embedding")
    axes[0][0].set_ylabel("Loss above\nthe dense embedding (nats)")
    axes[0][0].legend(fontsize=6)
    scratch = table[table["stage"] == "scratch"]
    seeds = table["seed"].nunique()
    claims = ", ".join(f"{claim:.2f}x" for claim in PUBLISHED)
    figure.suptitle(f"{trained_on(scratch)}; {seeds} seeds, 95% intervals; dashed: {claims}", fontsize=7)
    save(figure, RESULTS / corpus / "embedding_compression.png")
    path = RESULTS / corpus / "embedding_compression.md"
    write_text(path, markdown(table))
    print(f"wrote {path}")


def draw_stage(axis: Axes, rows: pd.DataFrame) -> None:
    """Loss above the dense embedding against compression, for one stage."""
    for embedding, (color, marker) in LOOKS.items():
        compressed = summary(rows[rows["embedding"] == embedding])
        if len(compressed):
            x, y, half = compressed["compression"], compressed["mean"], compressed["half_width"]
            axis.errorbar(x, y, half, color=COLORS[color], marker=marker, capsize=2, label=embedding)
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.axhline(ONE_PERCENT, color=GREY, linewidth=0.6, linestyle=":")
    for claim in PUBLISHED:
        axis.axvline(claim, color=GREY, linewidth=0.6, linestyle="--")
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=0.05)
    axis.set_xticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
    axis.minorticks_off()


def with_differences(table: pd.DataFrame) -> pd.DataFrame:
    """The table with ``stage`` and ``difference``: validation loss minus that of the dense embedding of the same corpus
    and seed, trained for as many tokens. Raises UserError where there is no dense run to compare with."""
    stage = table["recovery_tokens"].map(
        lambda tokens: "scratch" if pd.isna(tokens) else "compressed" if tokens == 0 else "recovered"
    )
    table = with_settings(table.assign(stage=stage))
    dense = table[table["embedding"] == "dense"].set_index(["corpus", "seed", "stage"])["validation_loss_nats"]
    compared = [
        # Compressing nothing and training on nothing is the dense run itself.
        (row["corpus"], row["seed"], "scratch" if row["stage"] == "compressed" else row["stage"])
        for _, row in table.iterrows()
    ]
    if missing := [key for key in compared if key not in dense.index]:
        corpus, seed, trained = missing[0]
        raise UserError(f"seed {seed} on {corpus} has no dense run ({trained}) to compare with: run it first")
    return table.assign(difference=table["validation_loss_nats"] - [dense[key] for key in compared])


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One line a setting, by stage and compression: means over seeds, the difference with its interval and p-value."""
    compressed = []
    for key, group in rows.groupby(SETTING):
        mean, half_width = mean_and_interval(group["difference"].tolist())
        first = group.iloc[0]
        tested = len(group) > 1 and group["difference"].std() > 0
        compressed.append({
            **dict(zip(SETTING, key, strict=True)),
            "compression": first["embedding_compression"],
            "bytes": first["embedding_bytes"],
            "relative_error": mean_of(group, "embedding_relative_error"),
            "loss": group["validation_loss_nats"].mean(),
            "mean": mean,
            "half_width": half_width,
            "p_value": stats.ttest_1samp(group["difference"], 0).pvalue if tested else math.nan,
            "tokens_per_second": group["tokens_per_second"].mean(),
            "peak_memory_gib": group["peak_memory_gib"].mean(),
            "seeds": len(group),
        })  # fmt: skip
    columns = [*SETTING, "compression", "mean", "half_width"]
    return pd.DataFrame(compressed, columns=None if compressed else columns).sort_values(["stage", "compression"])


def mean_of(rows: pd.DataFrame, column: str) -> float:
    """NaN where the table has no such column."""
    return float(rows[column].mean()) if column in rows else math.nan


def markdown(table: pd.DataFrame) -> str:
    """Every setting in numbers, then what became of the goal and of the two published claims."""
    compressed = summary(table)
    lines = [
        "| stage | embedding | setting | compression | bytes | relative error | loss (nats) | above dense (nats) "
        "| perplexity, dense = 1 | p | peak memory (GiB) | seeds |",
        "|---" * 12 + "|",
    ]
    for _, one in compressed.iterrows():
        lines.append(
            f"| {one['stage']} | {one['embedding']} | {one['embedding_setting']} | {one['compression']:.2f}x "
            f"| {one['bytes']:,.0f} | {number(one['relative_error'], '.4f')} | {one['loss']:.4f} "
            f"| {one['mean']:+.4f} ± {number(one['half_width'], '.4f')} | {math.exp(one['mean']):.4f} "
            f"| {number(one['p_value'], '.2g')} | {number(one['peak_memory_gib'], '.3f')} | {one['seeds']} |"
        )
    first = table.iloc[0]
    notes = f"{trained_on(table[table['stage'] == 'scratch'])}; mean ± 95% interval (Student's t) of the paired "
    notes += "difference over seeds."
    return "\n".join(
        [*lines, "", *verdicts(compressed), "", notes, f"{first['hardware']}; torch {first['torch']}.", ""]
    )


def number(value: float, form: str) -> str:
    """``value`` in ``form``, nothing where there is none."""
    return "" if math.isnan(value) else format(value, form)


def verdicts(compressed: pd.DataFrame) -> list[str]:
    """The goal, and the published claims, in words."""
    lines = []
    good = compressed[
        (compressed["stage"] == "recovered") & (compressed["compression"] >= 4) & (compressed["mean"] <= ONE_PERCENT)
    ]
    if len(good):
        best = good.sort_values("mean").iloc[0]
        lines.append(
            f"* At 4x or more and within 1% of the dense perplexity after recovery: best is {best['embedding']} "
            f"{best['embedding_setting']} ({best['compression']:.2f}x, perplexity times {math.exp(best['mean']):.4f})."
        )
    elif (compressed["stage"] == "recovered").any():
        lines.append("* No method at 4x or more stays within 1% of the dense perplexity after recovery.")
    trains = compressed[(compressed["embedding"] == "tensor_train") & (compressed["stage"] == "compressed")]
    for _, one in trains.iterrows():
        lines.append(
            f"* Per-token tensor train at {one['compression']:.2f}x, as decomposed: perplexity times "
            f"{math.exp(one['mean']):.3f}; {'better' if is_better(one) else 'not better'} than the model it was made "
            "from."
        )
    return lines


def is_better(one: pd.Series) -> bool:
    """Whether the loss is below that of the dense embedding, with the upper end of the interval where there is one."""
    return bool(one["mean"] + (0 if math.isnan(one["half_width"]) else one["half_width"]) < 0)
