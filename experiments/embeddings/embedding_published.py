"""Perplexity of published weights (GPT-2, GPT-Neo) with their embedding compressed and not trained again.

    python -m experiments embedding_published measure FOLDER data=wikitext data.config_name=wikitext-2-raw-v1
    python -m experiments embedding_published draw

FOLDER holds config.json and model.safetensors. ``input``: the head keeps the dense rows; ``both``: the head, tied as
published, has the compressed rows too. Writes results/CORPUS/embedding_published.csv, one row a method and setting, and
.md. Shapes and ranks behind the claims of arXiv 2307.00526 are unknown; searched are those of its compressions.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from experiments.embeddings.methods import compressed_tables, with_settings
from experiments.study.figures import read_measured
from experiments.study.measuring import SETTINGS_HELP, composed, identity, is_measured, text_of, write_measured
from vocabfold.data.batches import Batches, BatchPlan
from vocabfold.data.corpora import load_corpus
from vocabfold.embeddings import DenseEmbedding, EmbeddingSettings, relative_error
from vocabfold.embeddings.build import describe_embedding
from vocabfold.embeddings.tt_svd import factorisations
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.heads.full import FullHead
from vocabfold.machine import origin
from vocabfold.models.gpt import GPT
from vocabfold.models.published import load_published
from vocabfold.runs.distributed import MeanLosses, Ranks, choose_device
from vocabfold.runs.settings import Settings
from vocabfold.runs.tables import RESULTS

COMPRESSIONS = (2.0, 3.31, 8.0)


def settings_for(size: int) -> Iterator[EmbeddingSettings]:
    """Dense, bits, and every compression that a claim names."""
    yield from (EmbeddingSettings(), EmbeddingSettings(name="int8"), EmbeddingSettings(name="int4"))
    for compression in COMPRESSIONS:
        for name in ("tensor_train", "low_rank"):
            yield EmbeddingSettings(name=name, compression=compression)
    smallest = max(factorisations(size), key=len)
    yield EmbeddingSettings(name="tensor_train", mode_sizes=list(smallest), ranks=[1] * (len(smallest) - 1))


@torch.no_grad()
def loss_of(model: GPT, head: FullHead, batches: Batches, device: torch.device) -> float:
    """Mean negative log likelihood in nats over every target."""
    sums = MeanLosses()
    for inputs, targets in batches.evaluation_batches():
        hidden = model(inputs.to(device))
        sums.add(head.loss(hidden.flatten(0, -2), targets.to(device).flatten()))
    return sums.means(Ranks(), "")["loss"]


@torch.no_grad()
def measure_weights(folder: Path, settings: Settings, sequence_length: int, batch_size: int) -> pd.DataFrame:
    """One row a method and setting. Raises UserError where model and corpus do not fit together."""
    device = choose_device("auto", "fp32", 0)
    model, corpus = (
        load_published(folder).to(device).eval(),
        load_corpus(settings.data),
    )
    if corpus.vocabulary_size > model.config.vocabulary_size:
        raise UserError(
            f"{corpus.name} has {corpus.vocabulary_size} tokens and {folder} {model.config.vocabulary_size}: "
            "choose the model's own tokenizer with data.tokenizer"
        )
    length = min(sequence_length, model.config.max_positions)
    batches = corpus.batches("valid", BatchPlan(length, batch_size, seed=0))
    table = model.token_embedding.rows(0, model.config.vocabulary_size).detach().clone()
    dense = FullHead(table.shape[1], len(table), nn.Parameter(table))
    rows = []
    for made in compressed_tables(table, settings_for(table.shape[1]), "embeddings"):
        embedding = made.embedding
        model.token_embedding = embedding.to(device)
        own = FullHead(table.shape[1], len(table), nn.Parameter(embedding.rows(0, len(table))))
        heads = {"input": dense} if isinstance(embedding, DenseEmbedding) else {"input": dense, "both": own}
        for place, head in heads.items():
            loss = loss_of(model, head, batches, device)
            rows.append({
                "model": folder.name,
                "corpus": corpus.name,
                "place": place,
                **describe_embedding(made.settings, embedding),
                "relative_error": relative_error(embedding, table),
                "validation_loss_nats": loss,
                "perplexity": math.exp(min(loss, 700.0)),
            })  # fmt: skip
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """Every row."""
    lines = ["| embedding | setting | where | compression | relative error | perplexity |", "|---" * 6 + "|"]
    for _, row in with_settings(table).iterrows():
        lines.append(
            f"| {row['embedding']} | {row['embedding_setting']} | {row['place']} | {row['embedding_compression']:.2f} "
            f"| {row['relative_error']:.4f} | {row['perplexity']:.2f} |"
        )
    return "\n".join([*lines, ""])


def add_options(parser: ArgumentParser) -> None:
    """The weights and the text."""
    parser.add_argument("folder", type=Path, help="of published weights")
    parser.add_argument("settings", nargs="+", metavar="KEY=VALUE", help=SETTINGS_HELP)
    parser.add_argument("--sequence-length", type=int, default=1024, help="default %(default)s")
    parser.add_argument("--batch-size", type=int, default=1, help="default %(default)s")


def measure(arguments: Namespace) -> None:
    """Measure every method and write the table."""
    settings = composed(arguments.settings)
    path = RESULTS / settings.corpus / "embedding_published.csv"
    measurement = identity("embedding_published", arguments, text_of(settings))
    if not is_measured(path, measurement):
        table = measure_weights(arguments.folder, settings, arguments.sequence_length, arguments.batch_size)
        write_measured(table.assign(**origin()), path, measurement)


def draw(corpus: str) -> None:
    """Write the table in words."""
    path = RESULTS / corpus / "embedding_published.csv"
    write_text(path.with_suffix(".md"), markdown(read_measured(path, ("place", "perplexity"))))
    print(f"wrote {path.with_suffix('.md')}")
