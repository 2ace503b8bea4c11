"""Training from every token store: bytes on disk, and the share of a training step that waits for its batch.

    python -m experiments token_store measure [--steps 96] [KEY=VALUE ...]
    python -m experiments token_store draw [CORPUS ...]

writes results/CORPUS/token_store.csv, one row a store, and .md. The model has the paper's head at the size of the
paper's ablation, whose steps are the fastest and so wait most.
"""

from __future__ import annotations

import tempfile
import time
from argparse import ArgumentParser, Namespace
from typing import Any

import pandas as pd
import torch

from experiments.study.figures import read_measured
from experiments.study.measuring import (
    add_settings,
    at_least_one,
    composed,
    identity,
    is_measured,
    text_of,
    write_measured,
)
from vocabfold.data.batches import Batches
from vocabfold.data.corpora import load_corpus
from vocabfold.data.token_file import STORES
from vocabfold.files import write_text
from vocabfold.heads import HeadSettings
from vocabfold.machine import origin
from vocabfold.models.build import ModelSettings, build_model
from vocabfold.runs.tables import RESULTS

NAME = "token_store"
WARM_UP_STEPS = 2


def measure_store(data: dict[str, Any], steps: int) -> dict[str, Any]:
    """One training of ``steps`` steps from a store: where its time went, and the losses that it saw."""
    corpus = load_corpus(data)
    torch.manual_seed(0)
    head = HeadSettings("paper", "folded", tied=False, scorer="scale_shift_sorted")
    model = build_model(
        ModelSettings(hidden_size=64, num_layers=4, num_heads=2, max_positions=256), head, corpus.vocabulary_size
    )
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)
    batches = Batches(corpus.train, sequence_length=256, batch_size=8, seed=0, end_token=corpus.end_token)
    waited = total = loss_sum = 0.0
    for step in range(steps + WARM_UP_STEPS):
        started = time.perf_counter()
        inputs, targets = batches.batch(step)
        ready = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = model(inputs, targets).loss
        loss.backward()
        optimizer.step()
        loss_sum += float(loss.detach())
        if step >= WARM_UP_STEPS:
            waited += ready - started
            total += time.perf_counter() - started
    return corpus.described | {
        "tokens": len(corpus.train),
        "stored_bytes": sum(path.stat().st_size for path in corpus.train.folder.glob("tokens.*")),
        "steps": steps,
        "mean_loss_nats": loss_sum / (steps + WARM_UP_STEPS),
        "step_milliseconds": 1e3 * total / steps,
        "waiting_share": waited / total,
    }


def markdown(table: pd.DataFrame) -> str:
    """The table and the goal."""
    lines = ["| store | bits a token on disk | a step (ms) | of it waiting for data |", "|---|---|---|---|"]
    for _, row in table.iterrows():
        bits = 8 * row["stored_bytes"] / row["tokens"]
        lines.append(f"| {row['store']} | {bits:.3f} | {row['step_milliseconds']:.1f} | {row['waiting_share']:.2%} |")
    first, most = table.iloc[0], table["waiting_share"].max()
    same = "the same" if table["mean_loss_nats"].nunique() == 1 else "NOT the same"
    return "\n".join(
        [
            *lines,
            "",
            f"* a step waits at most 2% for data: at most {most:.2%}: {'met' if most <= 0.02 else 'not met'}",
            f"* losses of all {first['steps']} steps: {same} from every store",
            "",
            f"{first['corpus']}, {first['tokens']:,} tokens; windows in random order. Hardware: {first['hardware']}.",
            "",
        ]
    )


def add_options(parser: ArgumentParser) -> None:
    """Steps and the text."""
    parser.add_argument("--steps", type=int, default=96, help="default %(default)s")
    add_settings(parser)


def measure(arguments: Namespace) -> None:
    """Train from every store and write the table."""
    at_least_one(arguments, "steps")
    settings = composed(arguments.settings)
    path = RESULTS / settings.corpus / f"{NAME}.csv"
    measurement = identity(NAME, arguments, text_of(settings))
    if is_measured(path, measurement, timed=True):
        return
    rows = []
    with tempfile.TemporaryDirectory() as cache_dir:
        for store in STORES:
            data = settings.data | {"cache_dir": cache_dir, "workers": 1, "store": store, "layout": "packed"}
            lead = {"experiment": NAME, "store": store}
            rows.append(lead | measure_store(data, arguments.steps) | origin())
    write_measured(pd.DataFrame(rows), path, measurement)


def draw(corpus: str) -> None:
    """Write the table in words."""
    path = RESULTS / corpus / f"{NAME}.csv"
    words = markdown(read_measured(path, ("store", "waiting_share")))
    write_text(path.with_suffix(".md"), words)
    print(words)
