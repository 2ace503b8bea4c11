"""Finished runs of main_comparison, document by document of the validation text.

    python -m experiments document_losses measure [KEY=VALUE ...]

writes results/CORPUS/document_losses.csv, one row a run and document: how many tokens of it were predicted, and the sum
of their losses. All runs predict the very same positions, and the documents' losses add up to the loss that the run
itself reported; without a table this ends where either is not so. main_comparison draws from it.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from experiments.study.measuring import add_settings, corpus_of, identity, is_measured
from vocabfold.data.batches import BatchPlan
from vocabfold.data.corpora import Corpus, load_corpus
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.machine import origin
from vocabfold.runs.distributed import choose_device
from vocabfold.runs.load import validation_losses
from vocabfold.runs.record import finished_runs
from vocabfold.runs.settings import load_settings
from vocabfold.runs.tables import IDENTITY_COLUMNS, RESULTS

EXPERIMENT = "main_comparison"
MOST_ROWS = 1_000  # a run; neighbouring documents of a longer text are taken together
TOLERANCE_NATS = 1e-4  # between the documents' mean and the loss that training reported


def documents_of(corpus: Corpus, positions: np.ndarray) -> np.ndarray:
    """The validation document of each token position, [targets]; of more than MOST_ROWS documents neighbours share
    the number of the first of them."""
    starts = np.asarray(corpus.valid.document_starts).astype(np.int64)
    document = np.searchsorted(starts, positions, side="right") - 1
    together = -(-corpus.valid.num_documents // MOST_ROWS)
    result: np.ndarray = document // together * together
    return result


def measure_run(folder: Path, row: dict[str, Any], corpus: Corpus, device: torch.device) -> pd.DataFrame:
    """Columns document, tokens, loss_nats of one run. Raises UserError where they do not add up to its own loss."""
    settings = load_settings(folder)
    losses, _ = validation_losses(folder, corpus, device)
    reported = row["validation_loss_nats"]
    if not abs(float(losses.mean()) - reported) <= TOLERANCE_NATS:
        raise UserError(
            f"{folder} reported a loss of {reported:.5f} nats and has {float(losses.mean()):.5f} on the validation "
            "text as it is now: the text or the code is another; train the run again"
        )
    plan = BatchPlan(settings.sequence_length, settings.evaluation_batch_size, seed=0)
    documents = documents_of(corpus, corpus.batches("valid", plan).target_positions())
    grouped = pd.Series(losses.numpy()).groupby(documents)
    table = pd.DataFrame({"tokens": grouped.size(), "loss_nats": grouped.sum().round(4)})
    return table.rename_axis("document").reset_index()


def losses_of_runs(runs: list[tuple[Path, dict[str, Any]]]) -> pd.DataFrame:
    """Every run's documents. Raises UserError where runs of a corpus predict other positions."""
    device = choose_device("auto", "fp32", 0)
    corpora: dict[str, Corpus] = {}
    texts: dict[str, pd.DataFrame] = {}  # by corpus, the documents and tokens of the first run
    tables = []
    for folder, row in tqdm(runs, desc="runs"):
        settings = load_settings(folder)
        key = repr((settings.data, settings.development_share))
        if key not in corpora:
            corpora[key] = load_corpus(settings.data).with_development(settings.development_share)
        table = measure_run(folder, row, corpora[key], device)
        text = table[["document", "tokens"]]
        if not texts.setdefault(row["corpus"], text).equals(text):
            raise UserError(
                f"{folder} was evaluated on other positions of {row['corpus']} than the run before it: compare runs of "
                "one validation text and one sequence_length; give another text its own data.label"
            )
        identity = {name: row.get(name) for name in IDENTITY_COLUMNS} | {"experiment": "document_losses"}
        tables.append(pd.DataFrame([identity]).merge(table, how="cross"))
    return pd.concat(tables, ignore_index=True)


add_options = add_settings


def measure(arguments: Namespace) -> None:
    """Evaluate the runs and write the table. Raises UserError where no run has finished."""
    corpus = corpus_of(arguments.settings)
    runs = finished_runs(EXPERIMENT, corpus)
    path = RESULTS / corpus / "document_losses.csv"
    measurement = identity("document_losses", arguments, [folder.name for folder, _ in runs])
    if is_measured(path, measurement, "measurement"):
        return
    table = losses_of_runs(runs).assign(measurement=measurement, **origin())
    write_text(path, table.to_csv(index=False))
    print(f"wrote {path}")
