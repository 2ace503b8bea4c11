"""Perplexity against compression of the input embedding: compressed after training, after recovery, and from scratch.

results/SCALE/embedding_compression.csv -> results/SCALE/embedding_compression.png and .md. The runs behind the table:

    python -m vocabfold.train --multirun experiment=embedding_compression scale=SCALE
    python -m vocabfold.compress_embedding RUN ... @conf/compression/embedding_compression_SCALE.txt
"""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats

from experiments.embeddings.methods import LOOKS, PUBLISHED
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, draw_for_scales, save
from experiments.study.statistics import mean_and_interval
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.runs.record import RESULTS, read_table

STAGES = {"compressed": "Compressed after training", "recovered": "and trained on", "scratch": "From scratch"}
ARM = ["stage", "embedding", "embedding_setting"]
ONE_PERCENT = math.log(1.01)


def draw(scale: str) -> None:
    """Write one scale's picture and table."""
    table = with_differences(read_table("embedding_compression", scale))
    stages = [stage for stage in STAGES if (table["stage"] == stage).any()]
    corpora = sorted(table["corpus"].unique())
    size = (COLUMN_INCHES * 2, 0.5 + 2.0 * len(corpora))
    figure, axes = plt.subplots(len(corpora), len(stages), figsize=size, sharex=True, sharey=True, squeeze=False)
    for row, corpus in zip(axes, corpora, strict=True):
        for axis, stage in zip(row, stages, strict=True):
            draw_stage(axis, table[(table["corpus"] == corpus) & (table["stage"] == stage)])
        row[0].set_ylabel(f"{corpus}: loss above\nthe dense embedding (nats)")
    for axis, lowest, stage in zip(axes[0], axes[-1], stages, strict=True):
        axis.set_title(STAGES[stage], fontsize=8)
        lowest.set_xlabel("Compression of the embedding")
    axes[0][0].legend(fontsize=6)
    figure.suptitle(f"{table['seed'].nunique()} seeds, 95% intervals; dashed: 3.31x, 38.40x", fontsize=7)
    save(figure, RESULTS / scale / "embedding_compression.png")
    path = RESULTS / scale / "embedding_compression.md"
    parts = [table[table["corpus"] == corpus] for corpus in corpora]
    write_text(path, "\n".join(markdown(part) for part in parts))
    print(f"wrote {path}")


def draw_stage(axis: Axes, rows: pd.DataFrame) -> None:
    """Loss above the dense embedding against compression, for one corpus and stage."""
    for embedding, (color, marker) in LOOKS.items():
        arms = summary(rows[rows["embedding"] == embedding])
        if len(arms):
            x, y, half = arms["compression"], arms["mean"], arms["half_width"]
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
    table = table.assign(stage=stage, embedding_setting=table["embedding_setting"].fillna(""))
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
    """One line an arm, by falling compression: means over seeds, the difference with its 95% interval and p-value."""
    arms = []
    for key, group in rows.groupby(ARM):
        mean, half_width = mean_and_interval(group["difference"].tolist())
        first = group.iloc[0]
        tested = len(group) > 1 and group["difference"].std() > 0
        arms.append({
            **dict(zip(ARM, key, strict=True)),
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
    columns = [*ARM, "compression", "mean", "half_width"]
    return pd.DataFrame(arms, columns=None if arms else columns).sort_values(["stage", "compression"])


def mean_of(rows: pd.DataFrame, column: str) -> float:
    """NaN where the table has no such column."""
    return float(rows[column].mean()) if column in rows else math.nan


def markdown(table: pd.DataFrame) -> str:
    """Every arm of one corpus in numbers, then what became of the goal and of the two published claims."""
    arms = summary(table)
    lines = [
        "| stage | embedding | setting | compression | bytes | relative error | loss (nats) | above dense (nats) "
        "| perplexity, dense = 1 | p | peak memory (GiB) | seeds |",
        "|---" * 12 + "|",
    ]
    for _, arm in arms.iterrows():
        lines.append(
            f"| {arm['stage']} | {arm['embedding']} | {arm['embedding_setting']} | {arm['compression']:.2f}x "
            f"| {arm['bytes']:,.0f} | {number(arm['relative_error'], '.4f')} | {arm['loss']:.4f} "
            f"| {arm['mean']:+.4f} ± {number(arm['half_width'], '.4f')} | {math.exp(arm['mean']):.4f} "
            f"| {number(arm['p_value'], '.2g')} | {number(arm['peak_memory_gib'], '.3f')} | {arm['seeds']} |"
        )
    first = table.iloc[0]
    notes = f"Corpus {first['corpus']}; mean ± 95% interval (Student's t) of the paired difference over seeds."
    return "\n".join([*lines, "", *verdicts(arms), "", notes, f"{first['hardware']}; torch {first['torch']}.", ""])


def number(value: float, form: str) -> str:
    """``value`` in ``form``, nothing where there is none."""
    return "" if math.isnan(value) else format(value, form)


def verdicts(arms: pd.DataFrame) -> list[str]:
    """The goal, and the published claims, in words."""
    lines = []
    good = arms[(arms["stage"] == "recovered") & (arms["compression"] >= 4) & (arms["mean"] <= ONE_PERCENT)]
    if len(good):
        best = good.sort_values("mean").iloc[0]
        lines.append(
            f"* At 4x or more and within 1% of the dense perplexity after recovery: best is {best['embedding']} "
            f"{best['embedding_setting']} ({best['compression']:.2f}x, perplexity times {math.exp(best['mean']):.4f})."
        )
    elif (arms["stage"] == "recovered").any():
        lines.append("* No method at 4x or more stays within 1% of the dense perplexity after recovery.")
    trains = arms[(arms["embedding"] == "tensor_train") & (arms["stage"] == "compressed")]
    for _, arm in trains.iterrows():
        lines.append(
            f"* Per-token tensor train at {arm['compression']:.2f}x, as decomposed: perplexity times "
            f"{math.exp(arm['mean']):.3f}; {'better' if is_better(arm) else 'not better'} than the model it was made "
            "from."
        )
    return lines


def is_better(arm: pd.Series) -> bool:
    """Whether the loss is below that of the dense embedding, with the upper end of the interval where there is one."""
    return bool(arm["mean"] + (0 if math.isnan(arm["half_width"]) else arm["half_width"]) < 0)


if __name__ == "__main__":
    draw_for_scales("embedding_compression", draw)()
