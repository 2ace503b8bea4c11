"""The ways to keep an embedding table as the programs draw them, and a table compressed in each that can reach it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pandas as pd
from torch import Tensor
from tqdm import tqdm

from vocabfold.embeddings import EmbeddingSettings, TokenEmbedding, compress_table
from vocabfold.embeddings.build import resolve_settings
from vocabfold.errors import OutOfReach

LOOKS = {
    "tensor_train": ("blue", "o"),
    "tt_matrix": ("purple", "^"),
    "low_rank": ("green", "s"),
    "int8": ("orange", "D"),
    "int4": ("red", "v"),
}
# What arXiv 2307.00526 claims: the compression at which it calls the model better than the original, and the highest.
PUBLISHED = (3.31, 38.40)


def with_settings(table: pd.DataFrame) -> pd.DataFrame:
    """The table with ``embedding_setting``: the columns that describe each method's size in one word for a reader."""

    def words(row: pd.Series) -> str:
        if row["embedding"] == "tensor_train":
            return f"{row['embedding_mode_sizes']} r{row['embedding_ranks']}"
        if pd.notna(row.get("embedding_rank")):
            return f"rank {row['embedding_rank']:.0f}"
        if not str(row["embedding"]).startswith("int"):
            return ""
        return f"group {group:.0f}" if pd.notna(group := row.get("embedding_group_size")) else "row"

    return table.assign(embedding_setting=table.apply(words, axis=1))


@dataclass(frozen=True)
class Compressed:
    """``settings`` with nothing left open, and what they made of a table; ``wanted`` is what was asked for."""

    wanted: EmbeddingSettings
    settings: EmbeddingSettings
    embedding: TokenEmbedding
    seconds: float


def compressed_tables(table: Tensor, settings: Iterable[EmbeddingSettings], description: str) -> Iterator[Compressed]:
    """``table`` [V, D] compressed in every way; those whose compression is out of reach are left out."""
    for wanted in tqdm(list(settings), desc=description):
        began = time.perf_counter()
        try:
            resolved = resolve_settings(wanted, table)
            embedding = compress_table(resolved, table)
        except OutOfReach:
            continue
        seconds = time.perf_counter() - began
        embedding.prepare_for_inference()
        yield Compressed(wanted, resolved, embedding, seconds)
