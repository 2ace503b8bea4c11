"""One training step with each head, in one interleaved run: seconds, memory, lower bounds, and the goals met.

    python -m experiments training_step measure [--rounds 5] [KEY=VALUE ...]
    python -m experiments training_step draw

writes results/cost/training_step.csv, one row a method and round, and .md with the goals. ``no_head`` is the same
backbone with a head that costs nothing: no head can be faster or leaner. "Default allocator" is a process of its own
that gives freed memory back to the system, as every program does that does not call vocabfold.measure.allocator.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import median

import pandas as pd
import torch
from torch import Tensor

from experiments.heads.training_sides import (
    BESIDE_FULL,
    CHUNKED,
    CHUNKS,
    DEFAULT_ALLOCATOR,
    FULL,
    HEAD_ROUNDS,
    HEADS,
    NO_HEAD,
    SCALE_SHIFT,
    Case,
    Side,
)
from experiments.heads.training_step_words import describe, goals, setting_of
from experiments.study.figures import read_measured
from experiments.study.lower_bound import least_bytes, products_of
from experiments.study.measuring import (
    COST,
    add_rounds,
    add_settings,
    add_sizes,
    composed,
    identity,
    is_measured,
    measuring_device,
    model_of,
    text_of,
    write_measured,
)
from experiments.study.other_process import OtherProcess
from vocabfold.data.corpora import Corpus, load_corpus
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.machine import (
    BYTES_PER_GIB,
    matrix_rate_flops_per_second,
    memory_bandwidth_bytes_per_second,
    origin,
)
from vocabfold.measure.memory import live_tensors, peak_memory_of
from vocabfold.measure.speed import interleaved_seconds
from vocabfold.models.build import ModelSettings
from vocabfold.runs.tables import RESULTS
from vocabfold.runs.token_order import token_order


def default_allocator_steps(case: Case) -> dict[str, Callable[[], None]]:
    """The steps that run in a process with the default allocator."""
    return {name: Side(case, name).step_and_release for name in (FULL, SCALE_SHIFT)}


def fastest_chunk(case: Case) -> int:
    """The chunk of CHUNKS with which the head alone is fastest."""
    sides = {str(rows): Side(case, CHUNKED, rows).head_step for rows in CHUNKS}
    seconds = interleaved_seconds(sides, rounds=2, warmup=1, device=case.inputs.device, progress=True)
    return min(CHUNKS, key=lambda rows: median(seconds[str(rows)]))


def measure_steps(case: Case, rounds: int) -> pd.DataFrame:
    """One row a method and round."""
    device = case.inputs.device
    on_cpu = device.type == "cpu"
    chunk_rows = fastest_chunk(case)
    rate = matrix_rate_flops_per_second(device, torch.float32)
    bandwidth = memory_bandwidth_bytes_per_second(device)
    sides = {name: Side(case, name, chunk_rows) for name in (FULL, CHUNKED, *HEADS, NO_HEAD)}
    calls: dict[str, Callable[[], None]] = {name: side.step_and_release for name, side in sides.items() if name != FULL}
    heads = {name: sides[name].head_step for name in HEADS}
    with (
        OtherProcess(default_allocator_steps, case) if on_cpu else nullcontext() as other
    ):  # an allocator of the CPU alone
        if other is not None:
            calls |= {name + DEFAULT_ALLOCATOR: partial(other.call, name) for name in (FULL, SCALE_SHIFT)}
        seconds = interleaved_seconds(calls, rounds, 1, device, progress=True)
    # Two full softmaxes at once, one of which keeps its memory, are more than a small machine holds: a run of its own.
    kept = {FULL: sides[FULL].step_and_release, SCALE_SHIFT + BESIDE_FULL: sides[SCALE_SHIFT].step_and_release}
    seconds |= interleaved_seconds(kept, rounds, 1, device, progress=True)
    head_seconds = interleaved_seconds(heads, HEAD_ROUNDS, 3, device, progress=True)
    rows = []
    for call in [*calls, *kept]:
        name = call.removesuffix(DEFAULT_ALLOCATOR).removesuffix(BESIDE_FULL)
        side = sides[name]
        memory = peak_memory_of(side.step, device, live_tensors(side.model, side.optimizer))
        row: dict[str, object] = {"method": call, "chunk_rows": chunk_rows if name == CHUNKED else None}
        row |= {"tokens": case.inputs.numel(), "peak_memory_gib": memory.peak_bytes / BYTES_PER_GIB}
        row |= {"matrix_rate_flops_per_second": rate, "bandwidth_bytes_per_second": bandwidth}
        if call in HEADS:
            products = products_of(side.head_step, device)
            row |= {"head_flops": products.flops, "head_products_seconds": products.seconds}
            row |= {"head_bytes": least_bytes(side.head_inputs()), "head_seconds": median(head_seconds[call])}
        rows += [row | {"round": index, "seconds": value} for index, value in enumerate(seconds[call])]
    return pd.DataFrame(rows)


def first_tokens(corpus: Corpus, count: int) -> Tensor:
    """The first ``count`` training tokens. Raises UserError where there are fewer."""
    if len(corpus.train) < count:
        raise UserError(
            f"{corpus.name} has {len(corpus.train):,} tokens, and {count:,} are wanted: choose a longer text"
        )
    return torch.from_numpy(corpus.train.tokens[:count].astype("int64"))


def build_case(model: ModelSettings, corpus: Corpus, tokens: Tensor, batch_size: int, device: torch.device) -> Case:
    """The first sequences of the corpus as one batch, and each head's order, counted on all of it."""
    length = model.max_positions + 1
    batch = tokens[: batch_size * length].view(batch_size, length).to(device)
    orders = {
        name: token_order(settings, corpus.vocabulary_size, corpus.train.tokens) for name, settings in HEADS.items()
    }
    return Case(model, corpus.vocabulary_size, batch[:, :-1], batch[:, 1:], orders)


def add_options(parser: ArgumentParser) -> None:
    """Rounds, sizes, and the text."""
    add_rounds(parser, 5)
    add_sizes(parser, ModelSettings(), batch_size=8)
    add_settings(parser)


def measure(arguments: Namespace) -> None:
    """Time every head on the first tokens of a text, and write the table."""
    settings = composed(arguments.settings)
    path, measurement = COST / "training_step.csv", identity("training_step", arguments, text_of(settings))
    if is_measured(path, measurement, timed=True):
        return
    device, corpus = measuring_device(), load_corpus(settings.data)
    tokens = first_tokens(corpus, arguments.batch_size * (arguments.sequence_length + 1))
    case = build_case(model_of(arguments), corpus, tokens, arguments.batch_size, device)
    table = measure_steps(case, arguments.rounds).assign(
        **corpus.described,
        vocabulary_size=corpus.vocabulary_size,
        hidden_size=arguments.hidden_size,
        num_layers=arguments.num_layers,
        batch_size=arguments.batch_size,
        sequence_length=arguments.sequence_length,
        distinct_targets=len(case.targets.unique()),
        **origin(),
    )
    write_measured(table, path, measurement, beside="run")


def draw(corpus: str) -> None:
    """Write the table in words, with the goals."""
    path = RESULTS / corpus / "training_step.csv"
    table = read_measured(path, ("method", "head_seconds"))
    parts = [rows for _, rows in table.groupby("run", sort=False)]  # sizes and texts apart
    words = "\n".join(f"{describe(rows)}\n\n{setting_of(rows)}\n{goals(rows)}\n" for rows in parts)
    write_text(path.with_suffix(".md"), words)
    print(words + f"wrote {path.with_suffix('.md')}")
