"""Tables of results: results/CORPUS/EXPERIMENT.csv, a row a run, or what an experiment measured of it.

A row's key is ``run``, the hash of the run's whole configuration, the content of its text included (identity.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vocabfold.errors import UserError
from vocabfold.files import write_text

if TYPE_CHECKING:
    import pandas as pd

RESULTS = Path("results")
# Which run it is, of which text, and what it was.
IDENTITY_COLUMNS = [
    "run",
    "experiment",
    "corpus",
    "corpus_sha256",
    "corpus_documents",
    "corpus_tokens",
    "seed",
    "model",
    "hidden_size",
    "num_layers",
    "head",
    "scorer",
    "partition_order",
    "group_size",
    "num_groups",
    "shortlist",
    "tied",
    "learning_rate",
]
RUN_COLUMNS = [
    *IDENTITY_COLUMNS,
    "steps",
    "tokens",
    "validation_loss_nats",
    "perplexity",
    "group_accuracy",
    "tokens_per_second",
    "peak_memory_gib",
    "flops_per_token",
    "num_parameters",
]
ORIGIN_COLUMNS = ["hardware", "torch", "commit", "command"]
# Whole numbers that some rows do not have: without this a table would show them as fractions.
WHOLE_COLUMNS = ["corpus_documents", "corpus_tokens", "group_size", "num_groups", "shortlist"]
# Digits and a letter: a program that guesses reads 745e176 and 0012345678 as numbers.
HASH_COLUMNS = ["run", "full_run", "measurement", "commit", "corpus_sha256"]
# What tells rows apart for a person: they are sorted by it.
SORTED_BY = [
    "experiment",
    "corpus",
    "model",
    "head",
    "scorer",
    "partition_order",
    "group_size",
    "learning_rate",
    "seed",
]


def write_table(rows: pd.DataFrame, path: Path, key: Sequence[str] = ("run",)) -> Path:
    """Write a results table with its columns in the agreed order, sorted, and every row of ``rows`` in it.

    ``key``: what tells rows apart, ``run`` alone where a run has one row. Raises ValueError where it does not.
    """
    own = [name for name in rows.columns if name not in RUN_COLUMNS + ORIGIN_COLUMNS]
    table = rows.reindex(columns=RUN_COLUMNS + own + ORIGIN_COLUMNS)
    table[WHOLE_COLUMNS] = table[WHOLE_COLUMNS].astype("Int64")
    if (repeated := table.duplicated(list(key))).any():
        raise ValueError(f"{path}: {repeated.sum()} rows are not told apart by {', '.join(key)}")
    order = [*SORTED_BY, *(name for name in key if name not in SORTED_BY)]
    write_text(path, table.sort_values(order, kind="stable").to_csv(index=False))
    return path


def read_rows(path: Path) -> pd.DataFrame:
    """Any table of rows that our programs wrote: hashes are text, an empty cell is missing, a word such as "none" is a
    value."""
    import pandas as pd  # half a second of import time that a run without tables need not pay

    return pd.read_csv(path, dtype=dict.fromkeys(HASH_COLUMNS, str), keep_default_na=False, na_values=[""])


def read_table(experiment: str, corpus: str, results: Path = RESULTS) -> pd.DataFrame:
    """The committed or collected table of an experiment on a text. Raises UserError where there is none or it is
    another version's."""
    path = results / corpus / f"{experiment}.csv"
    if not path.is_file():
        raise UserError(f"{path} is missing: `make help` says what writes it")
    table = read_rows(path)
    if missing := [name for name in RUN_COLUMNS + ORIGIN_COLUMNS if name not in table.columns]:
        raise UserError(f"{path} has no column {missing[0]}: another version wrote it; measure it again")
    return table
