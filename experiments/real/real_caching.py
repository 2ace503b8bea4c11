"""A real model decoded with each cache: tokens a second, time to first token, peak memory, and what rounding costs.

    python -m experiments real_caching measure --text wikipedia=FILE [--part speed memory perplexity] [--rounds 3]
    python -m experiments real_caching draw

The prompts are pieces of a text. ``measure`` writes results/real/real_caching.csv (speed; one row a workload, cache and
round), real_caching_memory.csv and real_caching_perplexity.csv; a part that stands is not measured again. Our caches
work through ``vocabfold.hugging_face.pretrained``, transformers' own stand beside them; both decode greedily, one text
at a time.
"""

from __future__ import annotations

import math
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from tqdm import tqdm

from experiments.real.growing import (
    REAL,
    GrowingTable,
    add_model,
    add_texts,
    described,
    sha256_of,
    texts_of,
)
from experiments.real.loss import Piece, pieces_of, read_texts
from experiments.study.by_document import change_of, loss_columns
from experiments.study.figures import COLORS, COLUMN_INCHES, read_measured, save
from experiments.study.measuring import add_rounds, at_least_one, identity
from experiments.tokens.caching_speed import (
    CHUNK,
    OURS,
    Decoder,
    Workload,
    decoder_rows,
    keys_and_values,
    our_decoder,
    peak_row,
)
from experiments.tokens.caching_words import (
    FASTER_CLAIM,
    LEANER_CLAIM,
    memory_table,
    met,
    rows_of,
    seconds_of,
    speed_table,
    words,
)
from experiments.tokens.hugging_face import HuggingFaceReader
from experiments.tokens.quality import losses_through_cache
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.hugging_face import load, pretrained
from vocabfold.inference import LAYER_CACHES, bytes_a_position
from vocabfold.measure.allocator import keep_freed_memory
from vocabfold.measure.speed import interleaved_seconds, ratio_summary
from vocabfold.models.build import ModelWithHead
from vocabfold.runs.tables import RESULTS

NAME = "real_caching"
PARTS = ("speed", "memory", "perplexity")
PEERS = {"none": "none", "key/value": "dynamic", "prefix": "dynamic"}
LIBRARIES = {"vocabfold": (COLORS["blue"], "o"), "transformers": (COLORS["orange"], "s")}
REUSE = ("key/value", "prefix", "response", "all exact", "all coded")
# Few new tokens: without a cache each of them reads the whole text again.
WORKLOADS = (
    Workload("distinct", 32, 0, 16),
    Workload("distinct", 448, 0, 16),
    Workload("repeated", 448, 448, 16, REUSE),
    Workload("shared beginning", 512, 448, 1),
    Workload("new tokens alone", 64, 0, 1, ("key/value",)),  # what a prefix cache leaves to read, with no past to it
)
MEMORY_WORKLOADS = (Workload("distinct", 510, 0, 2), Workload("repeated", 510, 510, 2, REUSE))
SHORT, LONG, REPEATED, SHARED, ALONE = ((one.name, one.prompt_tokens, one.new_tokens) for one in WORKLOADS)
FIRST_TOKEN_GOAL = 5.0
TEXT_TOKENS = 20_000  # of the text are cut into prompts
LOSS_TOKENS, LOSS_DOCUMENTS = 512, 8  # of each document, and of the text, for the perplexity


def peer_decoder(model: Any, cache: str, workload: Workload, tokens: np.ndarray) -> Decoder:
    """Greedy decoding of the same model with one of transformers' caches."""
    beginning: Any = None
    held: Callable[[], list[torch.Tensor]] = list
    if cache == "prefix" and workload.shared_tokens:
        # One token of a repeated prompt must be read again, for its logits.
        shared = tokens[: min(workload.shared_tokens, workload.prompt_tokens - 1)].tolist()
        reader = HuggingFaceReader(model, PEERS[cache])
        reader.read(shared)
        assert reader.cache is not None
        beginning, held = (shared, reader.cache), partial(keys_and_values, reader.cache)

    def answer(prompt: list[int], count: int) -> Iterator[int]:
        reader = HuggingFaceReader(model, PEERS[cache], beginning)
        text = list(prompt)
        for _ in range(count):
            text.append(int(reader.read(text).argmax()))
            yield text[-1]

    return Decoder(model, "transformers", cache, workload, workload.prompts(tokens), answer, held)


def decoders_of(model: Any, ours: ModelWithHead, workload: Workload, tokens: np.ndarray, folder: Path) -> list[Decoder]:
    """All that take turns under one workload; ``folder`` takes the answers of each."""
    names = [name for name in OURS if name in workload.caches]
    decoders = [our_decoder(ours, name, workload, tokens, folder / name.replace("/", "-")) for name in names]
    return decoders + [peer_decoder(model, name, workload, tokens) for name in PEERS if name in workload.caches]


def speeds(model: Any, ours: ModelWithHead, tokens: np.ndarray, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Every workload, one after the other; within one all decoders take turns."""
    rows = []
    for number, workload in enumerate(tqdm(WORKLOADS, desc="workloads")):
        decoders = {
            f"{decoder.library} {decoder.cache}": decoder
            for decoder in decoders_of(model, ours, workload, tokens, folder / str(number))
        }
        steps = {name: decoder.step for name, decoder in decoders.items()}
        seconds = interleaved_seconds(steps, rounds, 1, torch.device("cpu"), progress=True)
        for name, decoder in decoders.items():
            baseline = decoders.get(f"{decoder.library} none", decoders[f"{decoder.library} key/value"])
            rows += decoder_rows(decoder, seconds[name], baseline)
    return rows


def memories(model: Any, ours: ModelWithHead, tokens: np.ndarray, folder: Path) -> list[dict[str, Any]]:
    """Peak memory of each cache, for an unseen prompt and for one that comes again."""
    rows = []
    for number, workload in enumerate(MEMORY_WORKLOADS):
        for decoder in tqdm(decoders_of(model, ours, workload, tokens, folder / str(number)), desc=workload.name):
            rows.append(peak_row(decoder))
    return rows


def perplexities(ours: ModelWithHead, pieces: list[Piece]) -> list[dict[str, Any]]:
    """One row a kind of keys and values; every document is read through its cache, CHUNK tokens at a time."""
    rows = []
    batches = [(piece.ids[None, :-1], piece.ids[None, 1:]) for piece in pieces]
    for kind, layer_cache in tqdm(LAYER_CACHES.items(), desc="perplexity"):
        sums, counts = losses_through_cache(ours, batches, kind, CHUNK)
        cache = ours.gpt.new_cache(1, layer_cache)
        with torch.inference_mode():
            ours.gpt(torch.zeros(1, 1, dtype=torch.long), cache)
        rows.append(
            {
                "key_values": kind,
                "bytes_a_position": bytes_a_position(cache),
                **loss_columns(pd.DataFrame({"tokens": counts.tolist(), "loss_nats": sums.tolist()})),
            }
        )
    return rows


def add_options(parser: ArgumentParser) -> None:
    """The model, its text, and which parts."""
    add_model(parser)
    add_texts(parser)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add_rounds(parser, 3)
    parser.add_argument("--threads", type=int, default=2, help="of torch (default %(default)s)")


def measure(arguments: Namespace) -> None:
    """Measure the parts that do not stand yet. Raises UserError for more than one text."""
    at_least_one(arguments, "rounds", "threads")
    texts = texts_of(arguments)
    if len(texts) > 1:
        raise UserError(f"--text is given {len(texts)} times: the prompts come from one text")
    [(name, path)] = texts.items()
    of_model = described(arguments.model)
    tables = {"speed": NAME, "memory": f"{NAME}_memory", "perplexity": f"{NAME}_perplexity"}
    left: dict[str, tuple[GrowingTable, str]] = {}
    for part in arguments.part:
        table = GrowingTable(tables[part])
        sizes = Namespace(rounds=arguments.rounds, threads=arguments.threads) if part == "speed" else Namespace()
        run = identity(table.name, sizes, of_model["model_sha256"], sha256_of(path))
        if run in table.runs:
            print(f"{table.path}: measured before")
        else:
            left[part] = (table, run)
    if not left:
        return
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load(arguments.model)
    ours = pretrained(model)
    documents = read_texts(path)
    tokens = np.concatenate([piece.ids.numpy() for piece in pieces_of(tokenizer, documents, most_targets=TEXT_TOKENS)])
    needed = max(one.prompt_tokens + one.new_tokens for one in (*WORKLOADS, *MEMORY_WORKLOADS)) - 1
    if ours.gpt.config.max_positions < needed or len(tokens) <= needed:
        raise UserError(f"the model has too few positions or {path} too few tokens: {needed} are needed")
    lead = of_model | {"text": name, "text_sha256": sha256_of(path), "threads": arguments.threads}
    for part, (table, run) in left.items():
        with tempfile.TemporaryDirectory() as answers:
            if part == "speed":
                rows = speeds(model, ours, tokens, arguments.rounds, Path(answers))
            elif part == "memory":
                rows = memories(model, ours, tokens, Path(answers))
            else:
                pieces = pieces_of(tokenizer, documents[:LOSS_DOCUMENTS], most_of_document=LOSS_TOKENS)
                rows = perplexities(ours, pieces)
        table.add(run, [lead | row for row in rows])


def speed_verdicts(table: pd.DataFrame) -> list[str]:
    """The goal, and "25% faster"."""
    first = seconds_of(rows_of(table, SHARED), "vocabfold", "seconds_to_first_token")
    sooner = ratio_summary(first, "key/value", "prefix")
    alone = np.median(seconds_of(rows_of(table, ALONE), "vocabfold", "seconds_to_first_token")["key/value"])
    lines = [
        f"* {met(sooner.median >= FIRST_TOKEN_GOAL)}: first token at 448 shared tokens of 512 at least "
        f"{FIRST_TOKEN_GOAL:.0f} times sooner with the prefix cache: {words(sooner)} times. The 64 new tokens alone, "
        f"with no past to restore and to attend to, take {1e3 * alone:.0f} ms, so that "
        f"{np.median(first['key/value']) / alone:.1f} times is the most that such a cache can reach."
    ]
    for key, base in ((SHORT, "none"), (LONG, "none"), (SHORT, "key/value"), (LONG, "key/value")):
        seconds = seconds_of(rows_of(table, key), "vocabfold")
        ratios = {cache: ratio_summary(seconds, base, cache).median for cache in seconds if cache not in (base, "none")}
        reached = [f"{cache} {ratio:.2f}" for cache, ratio in ratios.items() if ratio >= FASTER_CLAIM]
        others = [f"{cache} {ratio:.2f}" for cache, ratio in ratios.items() if ratio < FASTER_CLAIM]
        than = "no cache" if base == "none" else "a key/value cache"
        lines.append(
            f"* 25% faster than {than}, unseen prompts of {key[1]}: reached by {', '.join(reached) or 'none'}; "
            f"not by {', '.join(others) or 'none'}."
        )
    return lines


def memory_verdict(memory: pd.DataFrame) -> str:
    """ "30% less"."""
    rows = memory[(memory["library"] == "vocabfold") & (memory["workload"] == "distinct")].set_index("cache")
    shares = rows["peak_memory_mib"] / rows["peak_memory_mib"]["none"]
    reached = [str(cache) for cache, share in shares.items() if share <= LEANER_CLAIM]
    parts = ", ".join(f"{cache} {share:.3f}" for cache, share in shares.items() if cache != "none")
    return f"* 30% less peak memory than without a cache: {', '.join(reached) or 'no cache'} needs so little ({parts})."


def perplexity_lines(kinds: pd.DataFrame) -> list[str]:
    """What rounding costs and saves."""
    lines = [
        "| keys and values | bytes a position | of bf16's | loss (nats) | perplexity, exact = 1 |",
        "|---" * 5 + "|",
    ]
    half = kinds.loc[kinds["key_values"] == "bf16", "bytes_a_position"].iloc[0]
    for _, row in kinds.iterrows():
        change = change_of(row, kinds.iloc[0])
        mean, low, high = (math.exp(value) for value in (change.mean, change.low, change.high))
        lines.append(
            f"| {row['key_values']} | {row['bytes_a_position']:,.0f} | {row['bytes_a_position'] / half:.3f} "
            f"| {row['loss_nats']:.4f} | {mean:.4f} ({low:.4f} to {high:.4f}) |"
        )
    first = kinds.iloc[0]
    return [
        *lines,
        "",
        f"{first['documents']} documents of {first['text']}, {first['tokens']:,} tokens, 95% intervals.",
    ]


def draw(corpus: str) -> None:
    """Write the picture and the table in words, of the parts that are there."""
    path = RESULTS / corpus / f"{NAME}.csv"
    table = read_measured(path, ("workload", "cache", "library"))
    blocks = [speed_table(table, key) for key in (SHORT, LONG, REPEATED, SHARED)]
    told = speed_verdicts(table)
    memory_path = REAL / f"{NAME}_memory.csv"
    memory = read_measured(memory_path) if memory_path.is_file() else None
    if memory is not None:
        blocks.append(memory_table(memory))
        told.append(memory_verdict(memory))
    if (REAL / f"{NAME}_perplexity.csv").is_file():
        blocks.append("\n".join(perplexity_lines(read_measured(REAL / f"{NAME}_perplexity.csv"))))
    first = table.iloc[0]
    blocks.append("\n".join(told))
    blocks.append(
        f"{first['model']}, fp32, greedy, prompts from {first['text']}; {table['round'].nunique()} interleaved rounds: "
        f"medians, in brackets the 2.5 to 97.5% range of the rounds' ratios. Threads: {first['threads']}; "
        f"{first['hardware']}; torch {first['torch']}.\n"
    )
    write_text(path.with_suffix(".md"), "\n\n".join(blocks))
    draw_picture(table, memory, path.with_suffix(".png"))
    print("\n\n".join(blocks[-2:]))


def draw_picture(table: pd.DataFrame, memory: pd.DataFrame | None, path: Path) -> None:
    """Speed at both lengths, time to the first token after a shared beginning, and peak memory, by cache."""
    names = list(dict.fromkeys(table["cache"]))
    panels = [
        (rows_of(table, SHORT), "new tokens a second,\nprompt 32, unseen", lambda rows: SHORT[2] / rows["seconds"]),
        (rows_of(table, LONG), "new tokens a second,\nprompt 448, unseen", lambda rows: LONG[2] / rows["seconds"]),
        (rows_of(table, SHARED), "first token (s), 448 of\n512 tokens seen before", lambda rows: rows["seconds"]),
    ]
    if memory is not None:
        unseen = memory[memory["workload"] == "distinct"]
        panels.append((unseen, "peak memory (MiB),\ncontext 512", lambda rows: rows["peak_memory_mib"]))
    size = (2 * COLUMN_INCHES, 2.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True)
    for axis, (rows, label, values) in zip(axes, panels, strict=True):
        draw_panel(axis, rows, names, values)
        axis.set_xlabel(label)
        axis.set_xlim(left=0, right=1.05 * axis.get_xlim()[1])
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper right", ncols=2)
    first = table.iloc[0]
    title = f"{first['model']}, {first['text']}; {table['round'].nunique()} interleaved rounds: median and range"
    figure.suptitle(title, fontsize=7, x=0.02, ha="left")
    save(figure, path)


def draw_panel(
    axis: Axes, rows: pd.DataFrame, names: list[str], values_of: Callable[[pd.DataFrame], pd.Series]
) -> None:
    """Median and range of each library and cache."""
    for library, (color, marker) in LIBRARIES.items():
        for cache, of_cache in rows[rows["library"] == library].groupby("cache", sort=False):
            values = values_of(of_cache)
            middle = values.median()
            height = names.index(str(cache)) + (0.15 if library == "transformers" else -0.15)
            spread = [[middle - values.min()], [values.max() - middle]]
            axis.errorbar(middle, height, xerr=spread, color=color, marker=marker, capsize=2, label=library)
