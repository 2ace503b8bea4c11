"""The table and the picture of real_embedding: every way to keep an embedding, the goal and TensorGPT's two claims."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from experiments.embeddings.methods import LOOKS, PUBLISHED
from experiments.study.by_document import change_of
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, save
from experiments.study.statistics import Interval

DOCUMENT_TOKENS = 256  # of each document are read
GOAL_COMPRESSION, GOAL_RATIO = 7.0, 1.01
FLOAT, HALF = "float32", "bfloat16"
STYLES = {name: (COLORS[color], marker) for name, (color, marker) in LOOKS.items()} | {"mixed": ("black", "*")}
ROUNDED = ("int8", "int4", "mixed")


def with_changes(table: pd.DataFrame) -> pd.DataFrame:
    """The table with ``change``: the loss above that of the dense table on the same documents, as an Interval."""
    dense = table[table["embedding"] == "dense"].set_index(["text", "documents"])
    changes = [change_of(row, dense.loc[(row["text"], row["documents"])]) for _, row in table.iterrows()]
    return table.assign(change=pd.Series(changes, index=table.index, dtype=object))


def chosen(table: pd.DataFrame) -> pd.DataFrame:
    """Of ways that were measured on several numbers of documents those on most."""
    key = ["text", "embedding", "numbers", "side", "group_size", "wanted_compression"]
    ordered = table.sort_values("documents", kind="stable")
    last = ordered[~ordered.duplicated(key, keep="last")]
    return last[last["embedding"] != "dense"].sort_values(["compression", "embedding"], kind="stable")


def ratio(change: Interval) -> str:
    """The ratio of perplexities with its 95% interval."""
    low, mean, high = (math.exp(value) for value in (change.low, change.mean, change.high))
    digits = 4 if mean < 1.2 else 2
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})" if mean < 1e4 else f"{mean:.1e}"


def setting(row: pd.Series) -> str:
    """In a few words."""
    if not math.isnan(row["group_size"]):
        whole = row["group_size"] == row["hidden_size"]
        words = "a scale a row" if whole else f"groups of {row['group_size']:.0f}"
        if row["embedding"] == "mixed":
            words = f"int8 for the first {row['frequent_rows']:,.0f} tokens, else int4 in {words}"
        return words if row["side"] == "input" else f"{words}, output rows too"
    words = str(row["rank"]) if row["embedding"] == "tensor_train" else f"rank {row['rank']}"
    return words if row["numbers"] == FLOAT else f"{words}, {HALF}"


def markdown(table: pd.DataFrame) -> str:
    """Every way, the goal and the two claims."""
    table = with_changes(table)
    rows = chosen(table)
    texts = list(dict.fromkeys(table["text"]))
    lines = [
        "| embedding | how | compression | relative error | "
        + " | ".join(f"perplexity, {text}" for text in texts)
        + " |",
        "|---" * (4 + len(texts)) + "|",
    ]
    keys = ["embedding", "numbers", "side", "compression"]
    for _, group in rows.groupby(keys, sort=False):
        first = group.iloc[0]
        by_text = {row["text"]: row["change"] for _, row in group.iterrows()}
        cells = " | ".join(ratio(by_text[text]) if text in by_text else "" for text in texts)
        lines.append(
            f"| {first['embedding']} | {setting(first)} | {first['compression']:.2f}x | {first['relative_error']:.4f} "
            f"| {cells} |"
        )
    first = table.iloc[0]
    dense = table[table["embedding"] == "dense"].sort_values("documents").drop_duplicates("text", keep="last")
    losses = ", ".join(f"{row['text']} {row['loss_nats']:.3f}" for _, row in dense.iterrows())
    lines += ["", *verdicts(rows), ""]
    least, most = rows["documents"].min(), rows["documents"].max()
    number = f"{most}" if least == most else f"{least} to {most}"
    read = f"{number} a text, at most {DOCUMENT_TOKENS} tokens of each"
    lines.append(
        f"{first['model']}, V = {first['vocabulary_size']:,}, D = {first['hidden_size']}: a tied model. Its output "
        "rows stay as they are where nothing else is said, so the whole model becomes smaller only if these follow. "
        f"Perplexity of the dense table = 1; its loss in nats a token: {losses}. In brackets 95% intervals over "
        f"documents ({read}). Bytes against float32."
    )
    return "\n".join([*lines, f"Hardware: {first['hardware']}; torch {first['torch']}.", ""])


def verdicts(rows: pd.DataFrame) -> list[str]:
    """The goal of this project and the claims of arXiv 2307.00526, of what was measured."""
    rows = rows[rows["side"] == "input"]
    rows = rows.assign(ratio=[math.exp(change.mean) for change in rows["change"]])
    spread = rows.groupby(["embedding", "numbers", "compression"], as_index=False)["ratio"].agg(["min", "max"])
    lines = []
    small = spread[spread["compression"] >= GOAL_COMPRESSION].sort_values("max")
    if len(small):
        best = small.iloc[0]
        met = "met" if best["max"] <= GOAL_RATIO else "not met"
        lines.append(
            f"* Goal, {GOAL_COMPRESSION:.0f}x at a perplexity of at most {GOAL_RATIO}: {met}: {best['embedding']} at "
            f"{best['compression']:.2f}x, {best['min']:.4f} to {best['max']:.4f} times that of the dense table."
        )
    trains = spread[spread["embedding"] == "tensor_train"].sort_values("compression")
    for claim, words in zip(PUBLISHED, ("a better model at", "a compression of"), strict=True):
        near = trains[trains["compression"] >= claim]
        if len(near):
            row = near.iloc[0]
            better = "better" if row["max"] < 1 else "not better"
            lines.append(
                f'* TensorGPT, "{words} {claim:.2f}x": its trains at {row["compression"]:.2f}x ({row["numbers"]}) have '
                f"{row['min']:,.2f} to {row['max']:,.2f} times the perplexity: {better}."
            )
    return lines


def draw_texts(table: pd.DataFrame, path: Path) -> None:
    """Perplexity against compression, one column a text: everything above, the rounded tables alone below."""
    rows = chosen(with_changes(table))
    texts = list(dict.fromkeys(table["text"]))
    figure, axes = plt.subplots(2, len(texts), figsize=(2 * COLUMN_INCHES, 4.2), sharey="row", squeeze=False)
    is_rounded = rows["embedding"].isin(ROUNDED)
    for above, below, text in zip(*axes, texts, strict=True):
        of_text = rows["text"] == text
        draw_all(above, rows[of_text & (rows["side"] == "input")])
        draw_rounded(below, rows[of_text & is_rounded])
        above.set_title(text, fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("Perplexity, dense = 1")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    claims = " and ".join(f"{claim:.2f}x" for claim in PUBLISHED)
    title = (
        f"{table.iloc[0]['model']}; 95% intervals over documents. Above: input embedding; dashed: {claims}; "
        f"open: {HALF}.\nBelow: rounded tables; open: output rows too; dashed: the goal, {GOAL_RATIO} at "
        f"{GOAL_COMPRESSION:.0f}x"
    )
    figure.suptitle(title, fontsize=7)
    save(figure, path)


def draw_series(axis: Axes, rows: pd.DataFrame, method: str, column: str, filled: str, line: str) -> None:
    """The points of one method; those whose ``column`` is not ``filled`` are open and not joined."""
    color, marker = STYLES[method]
    for is_filled, of in rows[rows["embedding"] == method].groupby(rows[column] == filled):
        of = of.sort_values("compression")
        mean, low, high = (
            np.exp([getattr(change, name) for change in of["change"]]) for name in ("mean", "low", "high")
        )
        axis.errorbar(
            of["compression"],
            mean,
            [mean - low, high - mean],
            color=color,
            marker=marker,
            linestyle=line if is_filled else "",
            markerfacecolor=color if is_filled else "white",
            capsize=1.5,
            elinewidth=0.7,
            label=method if is_filled else None,
        )


def draw_all(axis: Axes, rows: pd.DataFrame) -> None:
    """Every method, both axes logarithmic."""
    for method in STYLES:
        draw_series(axis, rows, method, "numbers", FLOAT, "-")
    axis.axhline(1, color=GREY, linewidth=0.6)
    for claim in PUBLISHED:
        axis.axvline(claim, color=GREY, linewidth=0.6, linestyle="--")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
    axis.minorticks_off()


def draw_rounded(axis: Axes, rows: pd.DataFrame) -> None:
    """The methods whose loss is too small to be seen beside the others'."""
    for method in ROUNDED:
        draw_series(axis, rows, method, "side", "input", "")
    axis.axhline(1, color=GREY, linewidth=0.6)
    axis.axhline(GOAL_RATIO, color=GREY, linewidth=0.6, linestyle="--")
    axis.axvline(GOAL_COMPRESSION, color=GREY, linewidth=0.6, linestyle="--")
    axis.set_xlabel("Compression of the embedding")
