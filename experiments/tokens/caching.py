"""Decoding with each cache: tokens per second, time to first token, peak memory, and what rounding costs in perplexity.

    python -m vocabfold.train --multirun experiment=caching
    python -m experiments caching measure [--rounds 5] [--run FOLDER ...] [KEY=VALUE ...]
    python -m experiments caching draw [CORPUS ...]

measures with the newest run (perplexity with all) and writes results/CORPUS/caching.csv, one row a workload, cache and
round, caching_memory.csv and caching_perplexity.csv, and from these caching.md and caching.png.
"""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch

from experiments.study.figures import COLUMN_INCHES, GREY, read_measured, save
from experiments.study.measuring import (
    add_rounds,
    add_settings,
    corpus_of,
    identity,
    is_measured,
    run_folders,
    write_measured,
)
from experiments.tokens.caching_speed import (
    MEMORY_WORKLOADS,
    TRAINED,
    WORKLOADS,
    peak_memories,
    perplexities,
    speeds,
    trained_model,
)
from experiments.tokens.caching_words import (
    FULL,
    LIBRARIES,
    LONG,
    REPEATED,
    SHARED,
    SHORT,
    goals,
    memory_table,
    perplexity_table,
    rows_of,
    speed_table,
    verdicts,
)
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.machine import origin
from vocabfold.measure.allocator import keep_freed_memory
from vocabfold.runs.record import finished_row
from vocabfold.runs.tables import RESULTS


def add_options(parser: ArgumentParser) -> None:
    """Rounds, runs and the text."""
    add_rounds(parser, 5)
    parser.add_argument("--run", type=Path, nargs="+", help="folders of runs (default: those of experiment=caching)")
    add_settings(parser)


def measure(arguments: Namespace) -> None:
    """Measure speed, memory and perplexity, and write the three tables."""
    corpus = corpus_of(arguments.settings)
    folders = arguments.run or run_folders("caching", corpus)
    path = RESULTS / corpus / "caching.csv"
    measurement = identity("caching", arguments, [folder.name for folder in folders])
    if is_measured(path, measurement, timed=True):
        return
    keep_freed_memory()
    needed = max(one.prompt_tokens + one.new_tokens for one in (*WORKLOADS, *MEMORY_WORKLOADS)) - 1
    model, tokens = trained_model(folders[-1], needed)
    with tempfile.TemporaryDirectory() as answers:
        timed = speeds(model, tokens, arguments.rounds, Path(answers) / "speed")
        memory = peak_memories(model, tokens, Path(answers) / "memory")
    kinds = pd.DataFrame([row for folder in folders for row in perplexities(folder)])
    trained = finished_row(folders[-1]) or {}
    lead: dict[str, Any] = {name: trained.get(name) for name in TRAINED}
    for name, rows in (("caching_memory", memory), ("caching_perplexity", kinds), ("caching", timed)):
        table = pd.DataFrame([{"experiment": "caching"} | lead | row for row in rows.to_dict("records")])
        table = table.assign(threads=torch.get_num_threads(), **origin())
        write_measured(table, path.with_name(f"{name}.csv"), measurement)


def draw(corpus: str) -> None:
    """Write one corpus' picture and table."""
    table, kinds, memory = (read(corpus, name) for name in ("caching", "caching_perplexity", "caching_memory"))
    draw_picture(table, memory, corpus)
    first = table.iloc[0]
    parts = [speed_table(table, key) for key in (SHORT, LONG, REPEATED, SHARED)]
    parts += [memory_table(memory), perplexity_table(kinds), goals(table, kinds), verdicts(table, memory)]
    parts.append(
        f"{first['corpus']}; our model: hidden {first['hidden_size']}, {first['num_layers']} layers, "
        f"head={first['head']}, fp32, greedy; transformers: GPT-2 of the same size, random weights, full softmax. One "
        f"text at a time, {table['round'].nunique()} interleaved rounds: medians, in brackets the 2.5 to 97.5% range "
        f"of the rounds' ratios. Greedy texts of such small models repeat themselves, so that equal tokens prove "
        f"little for rounded caches. Threads: {first['threads']}; {first['hardware']}; torch {first['torch']}.\n"
    )
    path = RESULTS / corpus / "caching.md"
    write_text(path, "\n\n".join(parts))
    print("\n\n".join(parts[-3:]) + f"wrote {path}")


def read(corpus: str, name: str) -> pd.DataFrame:
    """One of the tables. Raises UserError where there is none or it is another's."""
    path = RESULTS / corpus / f"{name}.csv"
    if not path.is_file():
        raise UserError(f"{path} is missing: run `python -m experiments caching measure` first")
    return read_measured(path, ("experiment",))


def draw_picture(table: pd.DataFrame, memory: pd.DataFrame, corpus: str) -> None:
    """Tokens per second at both prompt lengths, time to the first token after a shared beginning, memory, by cache."""
    names = list(dict.fromkeys(table["cache"]))
    figure, axes = plt.subplots(1, 4, figsize=(2 * COLUMN_INCHES, 2.8), sharey=True)
    panels = (
        (SHORT, "new tokens per second,\nprompt 32, unseen"),
        (LONG, "new tokens per second,\nprompt 448, unseen"),
        (SHARED, "first token (ms), 448 of\n512 tokens seen before"),
        (FULL, "peak memory above\nweights (MiB), context 512"),
    )
    for index, (axis, (key, label)) in enumerate(zip(axes, panels, strict=True)):
        rows = rows_of(memory if key == FULL else table, key)
        for library, (color, marker) in LIBRARIES.items():
            for cache, of_cache in rows[rows["library"] == library].groupby("cache", sort=False):
                if index == 2:
                    values = 1e3 * of_cache["seconds_to_first_token"]
                elif index == 3:
                    values = of_cache["peak_memory_mib"] - of_cache["weights_mib"]
                else:
                    values = key[2] / of_cache["seconds"]
                middle = values.median()
                height = names.index(str(cache)) + (0.15 if library == "transformers" else -0.15)
                spread = [[middle - values.min()], [values.max() - middle]]
                axis.errorbar(middle, height, xerr=spread, color=color, marker=marker, capsize=2, label=library)
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper right", ncols=2)
    first = table.iloc[0]
    figure.suptitle(
        f"{first['corpus']}, hidden {first['hidden_size']}, {first['num_layers']} layers; {table['round'].nunique()} "
        "interleaved rounds: median and range",
        fontsize=7,
        color=GREY,
        x=0.02,
        ha="left",
    )
    save(figure, RESULTS / corpus / "caching.png")
