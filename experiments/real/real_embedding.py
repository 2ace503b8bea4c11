"""The input embedding of a real model in fewer bytes: what it costs in perplexity, TensorGPT's two claims among it.

    python -m experiments real_embedding measure --text NAME=FILE [--text ...] [--documents 8] [--only METHOD ...]
    python -m experiments real_embedding draw

writes results/real/real_embedding.csv (one row a text and way to keep the table), .png and .md. The first tokens of
each document are read alone by the model whose input rows are compressed; the output rows of the tied model stay,
but in the rows with ``side`` both, where they are rounded too. Rows that stand are not measured again.
"""

from __future__ import annotations

import copy
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.embeddings.methods import PUBLISHED
from experiments.real.embedding_words import (
    DOCUMENT_TOKENS,
    FLOAT,
    GOAL_COMPRESSION,
    HALF,
    STYLES,
    draw_texts,
    markdown,
)
from experiments.real.growing import (
    GrowingTable,
    add_model,
    add_texts,
    described,
    sha256_of,
    texts_of,
)
from experiments.real.loss import Piece, document_losses, pieces_of, read_texts
from experiments.study.by_document import loss_columns
from experiments.study.figures import report
from experiments.study.measuring import at_least_one, identity
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
COMPRESSIONS = (7, 3.31, 38.4, 2, 4, 16, 8, 64)  # in the order of their interest
METHODS = ("dense", *STYLES)


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


def draw(corpus: str) -> None:
    """Write the picture and the table in words."""
    report(RESULTS / corpus / f"{NAME}.csv", markdown, draw_texts, ("text", "embedding"))
