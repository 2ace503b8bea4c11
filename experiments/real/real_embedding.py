"""The input embedding of a real model in fewer bytes: what it costs in perplexity, TensorGPT's two claims among it.

    python -m experiments real_embedding measure --text NAME=FILE [--text ...] [--documents 8] [--only METHOD ...]
    python -m experiments real_embedding draw

writes results/real/real_embedding.csv (one row a text and way to keep the table), .png and .md. The first tokens of
each document are read alone by the model whose input rows are compressed; the output rows of the tied model stay,
but in the rows with ``side`` both, where they are rounded too. Rows that stand are not measured again.
"""

from __future__ import annotations

import copy
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from tqdm import tqdm

from experiments.embeddings.methods import LOOKS, PUBLISHED
from experiments.real.growing import (
    GrowingTable,
    add_model,
    add_texts,
    change_of,
    described,
    loss_columns,
    sha256_of,
    texts_of,
)
from experiments.real.loss import Piece, document_losses, pieces_of, read_texts
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, report, save
from experiments.study.measuring import at_least_one, identity
from experiments.study.statistics import Interval
from vocabfold.embeddings import (
    LowRankEmbedding,
    TensorTrainEmbedding,
    TokenEmbedding,
    TTMatrixEmbedding,
    relative_error,
)
from vocabfold.errors import OutOfReach
from vocabfold.hugging_face import compress_embedding, load
from vocabfold.runs.tables import RESULTS

NAME = "real_embedding"
DOCUMENT_TOKENS = 256  # of each document are read
COMPRESSIONS = (7, 3.31, 38.4, 2, 4, 16, 8, 64)  # in the order of their interest
GOAL_COMPRESSION, GOAL_RATIO = 7.0, 1.01
FLOAT, HALF = "float32", "bfloat16"
STYLES = {name: (COLORS[color], marker) for name, (color, marker) in LOOKS.items()} | {"mixed": ("black", "*")}
METHODS = ("dense", *STYLES)
ROUNDED = ("int8", "int4", "mixed")


@dataclass(frozen=True)
class Way:
    """A way to keep the table: ``compress_embedding``'s method and options, the type of the numbers that a factorised
    table keeps, and whether the output rows follow."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    numbers: str = FLOAT
    side: str = "input"

    def words(self) -> str:
        """For the progress bar."""
        return f"{self.method} {dict(self.options)} {self.numbers} {self.side}"


def ways() -> Iterator[Way]:
    """All that are compared; those that a model's sizes do not allow are left out later."""
    for group_size in (None, 32):
        yield Way("int8", {"group_size": group_size})
    for group_size in (None, 64, 32, 16):
        yield Way("int4", {"group_size": group_size})
    yield Way("mixed")
    yield Way("mixed", side="both")
    yield Way("int8", {"group_size": None}, side="both")
    yield Way("int4", {"group_size": 32}, side="both")
    for compression in COMPRESSIONS:
        for method in ("tensor_train", "tt_matrix", "low_rank"):
            yield Way(method, {"compression": compression})
            # Half as long numbers allow twice as many, and trains for each token reach no further otherwise.
            if compression == GOAL_COMPRESSION or (method == "tensor_train" and compression >= PUBLISHED[1]):
                yield Way(method, {"compression": compression / 2}, numbers=HALF)


def is_possible(way: Way, model: Any) -> bool:
    """Whether ``model`` has rows at both sides to round, and columns that the groups divide."""
    rows = model.get_input_embeddings().weight
    if way.side == "both" and model.get_output_embeddings().weight is not rows:
        return False
    return rows.shape[1] % (way.options.get("group_size") or 1) == 0


def compressed(model: Any, way: Way) -> tuple[Any, TokenEmbedding]:
    """(a copy of ``model`` with its input embedding kept in that ``way``, the embedding). Raises OutOfReach."""
    model = copy.deepcopy(model)
    embedding = compress_embedding(model, way.method, outputs=way.side == "both", **way.options)
    if way.numbers == HALF:
        with torch.no_grad():
            for parameter in embedding.parameters():
                parameter.copy_(parameter.bfloat16())
    return model, embedding


def excerpts(tokenizer: Any, texts: Mapping[str, Path], documents: int) -> dict[str, list[Piece]]:
    """The first tokens of the first ``documents`` of each text."""
    return {
        name: pieces_of(tokenizer, read_texts(path)[:documents], most_of_document=DOCUMENT_TOKENS)
        for name, path in texts.items()
    }


def embedding_columns(way: Way, embedding: TokenEmbedding, table: torch.Tensor) -> dict[str, Any]:
    """What a row says of the table that was kept; settings that a method does not have stay empty."""
    smaller = 2 if way.numbers == HALF else 1
    return {
        "embedding": way.method,
        "numbers": way.numbers,
        "side": way.side,
        "wanted_compression": way.options["compression"] * smaller if "compression" in way.options else None,
        "group_size": getattr(embedding, "group_size", None),
        "frequent_rows": getattr(embedding, "frequent_rows", None),
        "rank": rank_of(embedding),
        "compression": embedding.compression * smaller,
        "bytes": embedding.bytes_at_rest // smaller,
        "relative_error": relative_error(embedding, table),
    }


def rank_of(embedding: TokenEmbedding) -> str | None:
    """The ranks of a factorised table, with the mode sizes of a train for each token."""
    if isinstance(embedding, TensorTrainEmbedding):
        return f"{'x'.join(map(str, embedding.mode_sizes))} r{','.join(map(str, embedding.ranks))}"
    if isinstance(embedding, LowRankEmbedding):
        return str(embedding.narrow.shape[1])
    return str(max(core.shape[3] for core in embedding.cores)) if isinstance(embedding, TTMatrixEmbedding) else None


def add_options(parser: ArgumentParser) -> None:
    """The model, its texts and how much of them."""
    add_model(parser)
    add_texts(parser)
    parser.add_argument("--documents", type=int, default=8, help="of each text (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=METHODS, help="methods to measure (default: all)")


def measure(arguments: Namespace) -> None:
    """Measure every way that has no rows yet."""
    at_least_one(arguments, "documents")
    texts, of_model = texts_of(arguments), described(arguments.model)
    sources = {name: sha256_of(path) for name, path in texts.items()}
    table = GrowingTable(NAME)
    options = Namespace(documents=arguments.documents)
    left = {
        identity(NAME, options, of_model["model_sha256"], sources, way): way
        for way in (Way("dense"), *ways())
        if arguments.only is None or way.method in arguments.only
    }
    left = {run: way for run, way in left.items() if run not in table.runs}
    if not left:
        print(f"{table.path}: all of this was measured before")
        return
    model, tokenizer = load(arguments.model)
    pieces = excerpts(tokenizer, texts, arguments.documents)
    rows = model.get_input_embeddings().weight.detach().clone()
    for run, way in tqdm(left.items(), desc=NAME):
        if not is_possible(way, model):
            continue
        tqdm.write(way.words())
        try:
            reading, embedding = compressed(model, way)
        except OutOfReach as error:
            tqdm.write(f"left out: {error}")
            continue
        kept = embedding_columns(way, embedding, rows)
        lead = {**of_model, "vocabulary_size": len(rows), "hidden_size": rows.shape[1]}
        table.add(
            run,
            [
                lead
                | {"text": name, "text_sha256": sources[name]}
                | kept
                | loss_columns(document_losses(reading, of_text))
                for name, of_text in pieces.items()
            ],
        )
        del reading, embedding


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


def draw(corpus: str) -> None:
    """Write the picture and the table in words."""
    report(RESULTS / corpus / f"{NAME}.csv", markdown, draw_texts, ("text", "embedding"))
