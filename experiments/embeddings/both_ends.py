"""A folded head and a compressed embedding together, against the plain GPT-2: numbers, bytes, memory, perplexity.

    python -m vocabfold.train --multirun experiment=both_ends
    python -m vocabfold.train --multirun experiment=both_ends embedding=tt_matrix embedding.compression=16
    python -m experiments both_ends measure
    python -m experiments both_ends draw [CORPUS ...]

results/CORPUS/both_ends.csv and the plain GPT-2 of main_comparison.csv -> results/CORPUS/both_ends.png and .md. The
sizes at hidden 128 and 8 layers, the paper's 8.1 M model, are those of models built for the purpose, not trained.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from scipy import stats

from experiments.embeddings.methods import with_settings
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, save, trained_on
from experiments.study.measuring import add_settings, collect_runs
from experiments.study.statistics import mean_and_interval
from vocabfold.embeddings import EmbeddingSettings
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.heads import HeadSettings
from vocabfold.models.build import ModelSettings, build_model
from vocabfold.runs.tables import RESULTS, read_table

VOCABULARY_SIZE = 50_257
BYTES_PER_NUMBER = 4
SETTING = ["head", "scorer", "partition_order", "embedding", "embedding_setting"]
MEGABYTE = 1e6
GOAL = 4  # times fewer bytes than GPT-2


add_options = add_settings


def measure(arguments: Namespace) -> None:
    """Gather the finished training runs into the table."""
    collect_runs("both_ends", arguments.settings)


def draw(corpus: str) -> None:
    """Write one corpus' picture and table."""
    table = with_plain(corpus)
    draw_sizes(table, RESULTS / corpus / "both_ends.png")
    path = RESULTS / corpus / "both_ends.md"
    write_text(path, markdown(table) + "\n" + published_sizes())
    print(f"wrote {path}")


def with_plain(corpus: str) -> pd.DataFrame:
    """The runs of both ends after those of the plain GPT-2 of their size. Raises UserError where there is none."""
    runs, plain = read_table("both_ends", corpus), read_table("main_comparison", corpus)
    plain = plain[(plain["model"] == "gpt2") & (plain["head"] == "full")]
    size = runs["hidden_size"].iloc[0]
    plain = plain[plain["hidden_size"] == size]
    if plain.empty:
        raise UserError(
            f"results/{corpus}/main_comparison.csv has no plain GPT-2 of hidden size {size} to compare with"
        )
    # The plain rows are older than the columns of embeddings: a full softmax tied to a float32 table.
    plain = plain.assign(model_bytes=BYTES_PER_NUMBER * plain["num_parameters"], embedding="dense")
    table = with_settings(pd.concat([plain, runs], ignore_index=True))
    table[SETTING] = table[SETTING].astype(object).where(table[SETTING].notna(), "")
    return table


def settings_of(table: pd.DataFrame) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame, list[float]]]:
    """(key, rows, their losses minus that of the plain GPT-2 of the same seed) of each head and embedding."""
    plain = table[table["head"] == "full"].set_index("seed")
    for key, rows in table.groupby(SETTING, sort=False):
        rows = rows[rows["seed"].isin(plain.index)]
        if len(rows):
            differences = rows["validation_loss_nats"].to_numpy() - plain.loc[rows["seed"], "validation_loss_nats"]
            yield key, rows, differences.tolist()


def draw_sizes(table: pd.DataFrame, path: Path) -> None:
    """Loss above the plain GPT-2 against bytes, one point a head and embedding."""
    plain = table[table["head"] == "full"].set_index("seed")
    figure, axis = plt.subplots(figsize=(COLUMN_INCHES, 2.6))
    for position, (key, rows, differences) in enumerate(settings_of(table)):
        mean, half_width = mean_and_interval(differences)
        color, marker = list(COLORS.values())[position % len(COLORS)], "os^Dv"[position % 5]
        label = "GPT-2, full softmax" if key[0] == "full" else f"folded head, {key[3]} {key[4]}"
        megabytes = rows["model_bytes"].iloc[0] / MEGABYTE
        axis.errorbar(megabytes, mean, half_width, color=color, marker=marker, linestyle="", capsize=2, label=label)
    axis.axhline(0, color=GREY, linewidth=0.6)
    axis.axvline(plain["model_bytes"].iloc[0] / MEGABYTE / GOAL, color=GREY, linewidth=0.6, linestyle="--")
    axis.set_xlim(left=0)
    axis.set_xlabel(f"Bytes of the whole model (MB); dashed: GPT-2 / {GOAL}")
    axis.set_ylabel("Loss above GPT-2 (nats)")
    axis.legend(fontsize=6)
    figure.suptitle(f"{trained_on(table)}\n{table['seed'].nunique()} seeds, 95% intervals", fontsize=7)
    save(figure, path)


def markdown(table: pd.DataFrame) -> str:
    """One line a head and embedding, its loss minus that of the plain GPT-2 of the same seed."""
    plain = table[table["head"] == "full"].set_index("seed")
    lines = [
        "| head | embedding | parameters | MB | bytes, GPT-2 = 1 | training memory (GiB) | training tokens/s "
        "| loss (nats) | above GPT-2 (nats) | perplexity | seeds |",
        "|---" * 11 + "|",
    ]
    for key, rows, differences in settings_of(table):
        loss = rows["validation_loss_nats"]
        mean, half_width = mean_and_interval(differences)
        p_value = stats.ttest_1samp(differences, 0).pvalue if len(rows) > 1 and key[0] != "full" else math.nan
        words = (
            "0"
            if key[0] == "full"
            else f"{mean:+.3f} ± {half_width:.3f}" + (f" (p = {p_value:.2g})" if p_value == p_value else "")
        )
        first = rows.iloc[0]
        ratio = plain["model_bytes"].iloc[0] / first["model_bytes"]
        lines.append(
            f"| {named(str(key[0]), str(key[1]), key[2])} | {key[3]} {key[4]} | {first['num_parameters']:,.0f} "
            f"| {first['model_bytes'] / MEGABYTE:.2f} | 1/{ratio:.2f} | {rows['peak_memory_gib'].mean():.3f} "
            f"| {rows['tokens_per_second'].mean():,.0f} | {loss.mean():.4f} | {words} "
            f"| {math.exp(loss.mean()):.2f} | {len(rows)} |"
        )
    first = table.iloc[0]
    notes = f"{trained_on(table)}; paired over seeds, 95% intervals (Student's t)."
    notes += " Speeds are of separate runs on a machine with other work."
    return "\n".join([*lines, "", notes, f"{first['hardware']}; torch {first['torch']}.", ""])


def named(head: object, scorer: object, order: object) -> str:
    """The head of a row for a reader."""
    return "full softmax, tied" if head == "full" else f"folded, {scorer}, {order}"


def published_sizes() -> str:
    """Numbers and bytes at hidden 128, 8 layers, 8 heads: nothing here was trained."""
    sizes = ModelSettings(hidden_size=128, num_layers=8, num_heads=8, max_positions=512)
    folded = HeadSettings(
        "low_rank_clustered", "folded", tied=False, scorer="low_rank_sorted", rank=2
    )  # as large in every order
    built = [(HeadSettings(), EmbeddingSettings()), (folded, EmbeddingSettings())]
    for name, compression in (
        ("int8", None),
        ("int4", None),
        ("low_rank", 4.0),
        ("tt_matrix", 4.0),
        ("tt_matrix", 16.0),
    ):
        group_size = 32 if name == "int4" else None
        built.append((folded, EmbeddingSettings(name=name, compression=compression, group_size=group_size)))
    lines = ["Sizes at hidden 128, 8 layers (built, not trained):", ""]
    lines += ["| head | embedding | parameters | MB | bytes, GPT-2 = 1 |", "|---|---|---|---|---|"]
    plain_bytes = 0
    for head, embedding in built:
        model = build_model(sizes, head, VOCABULARY_SIZE, embedding=embedding)
        plain_bytes = plain_bytes or model.bytes_at_rest
        size = f" {embedding.compression:g}x" if embedding.compression else ""
        lines.append(
            f"| {named(head.name, f'{head.scorer}_rank{head.rank}', 'any order')} | {embedding.name}{size} "
            f"| {model.num_parameters:,} | {model.bytes_at_rest / MEGABYTE:.2f} "
            f"| 1/{plain_bytes / model.bytes_at_rest:.2f} |"
        )
    return "\n".join([*lines, ""])
