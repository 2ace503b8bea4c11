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
from dataclasses import dataclass
from functools import partial
from statistics import median

import pandas as pd
import torch
from torch import Tensor, nn

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
from vocabfold.heads import HeadSettings
from vocabfold.heads.settings import PartitionSettings
from vocabfold.machine import (
    BYTES_PER_GIB,
    matrix_rate_flops_per_second,
    memory_bandwidth_bytes_per_second,
    origin,
)
from vocabfold.measure.memory import live_tensors, peak_memory_of
from vocabfold.measure.speed import Ratio, interleaved_seconds, ratio_summary, tokens_per_second
from vocabfold.models.build import ModelSettings, ModelWithHead, build_model
from vocabfold.runs.tables import RESULTS
from vocabfold.runs.token_order import token_order

FULL, CHUNKED, NO_HEAD, SCALE_SHIFT = "full", "linear_cross_entropy in chunks", "no_head", "scale_shift_sorted"
DEFAULT_ALLOCATOR = ", default allocator"
BESIDE_FULL = ", beside full"  # the rounds of a second run, with the full softmax that keeps its memory
FAST = "_sorted"  # in the name of every scorer that computes its gradients in the forward pass

SPEED_OVER_FULL, SPEED_OVER_CHUNKED, SPEED_OF_NO_HEAD = 7.0, 2.6, 0.97
MEMORY_OF_NO_HEAD, MEMORY_UNDER_FULL, TIME_OVER_LOWER_BOUND = 1.05, 8.0, 2.0
CHUNKS = (256, 1024, 2048)  # rows at a time of torch's linear_cross_entropy: the fastest is compared
HEAD_ROUNDS = 15  # of the folded heads alone, after the steps: they take milliseconds
FULL_SETTINGS = HeadSettings("full", "full", tied=True)


def folded(scorer: str, tied: bool, order: str = "bpe", shortlist: int = 0) -> HeadSettings:
    """A folded head with groups of the default size."""
    return HeadSettings(scorer, "folded", tied, scorer=scorer, partition=PartitionSettings(order, shortlist=shortlist))


HEADS = {
    SCALE_SHIFT: folded("scale_shift_sorted", tied=False),
    "scale_shift": folded("scale_shift", tied=False),
    "low_rank_sorted": folded("low_rank_sorted", tied=False),
    "linear_sorted tied": folded("linear_sorted", tied=True),
    "linear_sorted tied, frequency": folded("linear_sorted", True, "frequency"),
    "linear_sorted tied, frequency, shortlist 512": folded("linear_sorted", True, "frequency", 512),
    "linear_sorted tied, frequency, shortlist 2048": folded("linear_sorted", True, "frequency", 2048),
    "linear_sorted untied": folded("linear_sorted", tied=False),
}


@dataclass(frozen=True)
class Case:
    """What every process needs to build the same methods: sizes, the batch [B, T] and its targets, orders by name."""

    model: ModelSettings
    vocabulary_size: int
    inputs: Tensor
    targets: Tensor
    orders: dict[str, Tensor | None]


class Side:
    """One model with its optimizer: whole training steps, and its head's forward and backward pass alone."""

    def __init__(self, case: Case, name: str, chunk_rows: int = CHUNKS[0]) -> None:
        torch.manual_seed(0)
        settings = HEADS.get(name, FULL_SETTINGS)
        if name == CHUNKED:
            settings = HeadSettings("chunked", "chunked", tied=True, chunk_rows=chunk_rows)
        self.model = build_model(case.model, settings, case.vocabulary_size, case.orders.get(name))
        self.model.to(case.inputs.device)
        self.case, self.without_head = case, name == NO_HEAD
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)  # as optimizer.py has it
        self.hidden = torch.randn(case.inputs.numel(), case.model.hidden_size, device=case.inputs.device)
        self.hidden.requires_grad_()

    def loss(self) -> Tensor:
        """Of the whole model."""
        return loss_of(self.model, self.case, self.without_head)

    def step(self) -> None:
        """A whole training step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def step_and_release(self) -> None:
        """The same, and gradients go: those of many models at once would fill the memory."""
        self.step()
        self.optimizer.zero_grad(set_to_none=True)

    def head_step(self) -> None:
        """Forward and backward of the head, on hidden states that are given."""
        self.optimizer.zero_grad(set_to_none=True)
        self.hidden.grad = None
        self.model.head.loss(self.hidden, self.case.targets.flatten()).loss.backward()

    def head_inputs(self) -> list[Tensor]:
        """What the head's loss depends on."""
        return [self.hidden, *self.model.head.parameters()]


def loss_of(model: ModelWithHead, case: Case, without_head: bool) -> Tensor:
    """The head's loss, or without a head the mean of the hidden states: it only has to send gradients back."""
    if without_head:
        hidden: Tensor = model.backbone(case.inputs)
        return hidden.mean()
    loss: Tensor = model(case.inputs, case.targets).loss
    return loss


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
    if is_measured(path, measurement):
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


def setting_of(table: pd.DataFrame) -> str:
    """What was timed where, in words."""
    first = table.iloc[0]
    shape = f"{first['tokens']:,} tokens a step"
    return (
        f"Hidden {first['hidden_size']}, {first['num_layers']} layers, V = 50,257, {shape}, fp32, fused Adam; "
        f"{table['round'].nunique()} interleaved rounds: median of the rounds' ratios and their 2.5 to 97.5% range; "
        f"heads alone: median of {HEAD_ROUNDS} rounds.\nTokens: the first of {first['corpus']}, real text and not "
        f"random ones. {first['hardware']}; torch {first['torch']}.\n"
    )


def seconds_of(table: pd.DataFrame) -> dict[str, list[float]]:
    """Seconds of every round of every method."""
    return {str(name): rows["seconds"].tolist() for name, rows in table.groupby("method", sort=False)}


def numbers(table: pd.DataFrame, column: str) -> dict[str, float]:
    """One number a method that is the same in all of its rounds; NaN where it has none."""
    return {str(name): float(rows[column].iloc[0]) for name, rows in table.groupby("method", sort=False)}


def lower_bounds(row: pd.Series) -> tuple[float, float]:
    """Least seconds of a head: bytes at the machine's bandwidth, plus products at its best matrix rate, or as fast as
    each of them is alone."""
    moving = row["head_bytes"] / row["bandwidth_bytes_per_second"]
    return moving + row["head_flops"] / row["matrix_rate_flops_per_second"], moving + row["head_products_seconds"]


def head_times(table: pd.DataFrame, name: str) -> tuple[float, float, float]:
    """(median seconds of the head alone, and that over each of the two lower bounds, NaN where there is none)."""
    row = table[table["method"] == name].iloc[0]
    best, own = lower_bounds(row)
    return row["head_seconds"], row["head_seconds"] / best, row["head_seconds"] / own


def describe(table: pd.DataFrame) -> str:
    """A markdown table: median of per-round ratios with their 2.5 to 97.5% range."""
    seconds, memory, chunk_rows = seconds_of(table), numbers(table, "peak_memory_gib"), numbers(table, "chunk_rows")
    num_tokens = int(table["tokens"].iloc[0])
    slowest = FULL + DEFAULT_ALLOCATOR if FULL + DEFAULT_ALLOCATOR in seconds else FULL
    lines = [
        f"| head | tokens/s | speed, {slowest} = 1 | speed, {NO_HEAD} = 1 | peak memory (GiB) | memory, {NO_HEAD} = 1 "
        "| head alone (ms) | over its lower bound | over its products' own |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, values in seconds.items():
        in_second_run = slowest != FULL and (name == FULL or name.endswith(BESIDE_FULL))
        to_full, to_free = (
            "" if in_second_run else between(ratio_summary(seconds, other, name)) for other in (slowest, NO_HEAD)
        )
        head, best, own = head_times(table, name)
        chunk = f" of {chunk_rows[name]:.0f}" if name == CHUNKED else ""
        cells = [
            name + chunk,
            f"{tokens_per_second(values, num_tokens):,.0f}",
            to_full,
            to_free,
            f"{memory[name]:.3f}",
            f"{memory[name] / memory[NO_HEAD]:.3f}",
            optional(1e3 * head, 1),
            optional(best, 2),
            optional(own, 2),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    row = table.iloc[0]
    lines.append(
        f"\nLower bound of a head: its matrix products at {row['matrix_rate_flops_per_second'] / 1e9:.0f} GFLOP/s (the "
        "machine's best), or each at the rate its own shape reaches alone, and each byte of inputs and dense gradients "
        f"once at {row['bandwidth_bytes_per_second'] / 1e9:.0f} GB/s; the exponentials are in neither."
    )
    return "\n".join(lines)


def goals(table: pd.DataFrame) -> str:
    """One line a goal: the number, and whether it is met."""
    seconds, memory = seconds_of(table), numbers(table, "peak_memory_gib")
    folded = [name for name, value in numbers(table, "head_seconds").items() if pd.notna(value)]
    best = min(folded, key=lambda name: median(seconds[name]))
    lines = [f"Goals (the fastest folded head is {best}):\n", "| goal | reached | |", "|---|---|---|"]

    def add(text: str, reached: str, met: bool | None) -> None:
        lines.append(f"| {text} | {reached} | {'' if met is None else 'met' if met else '**not met**'} |")

    if (default := FULL + DEFAULT_ALLOCATOR) in seconds:
        ratio = ratio_summary(seconds, default, best)
        bound = f"{ratio_summary(seconds, default, NO_HEAD).median:.1f}"
        text = f"speed >= {SPEED_OVER_FULL} x full softmax with the default allocator ({NO_HEAD} itself: {bound})"
        add(text, between(ratio), ratio.median >= SPEED_OVER_FULL)
        add(
            "the same, both with the default allocator",
            between(ratio_summary(seconds, default, SCALE_SHIFT + DEFAULT_ALLOCATOR)),
            None,
        )
    kept = between(ratio_summary(seconds, FULL, SCALE_SHIFT + BESIDE_FULL))
    add(f"{SCALE_SHIFT} over a full softmax that keeps its memory", kept, None)
    for other, least in ((CHUNKED, SPEED_OVER_CHUNKED), (NO_HEAD, SPEED_OF_NO_HEAD)):
        ratio = ratio_summary(seconds, other, best)
        add(f"speed >= {least} x {other}", between(ratio), ratio.median >= least)
    leanest = min(folded, key=lambda name: memory[name])
    add(
        f"memory <= {MEMORY_OF_NO_HEAD} x {NO_HEAD} (leanest: {leanest})",
        f"{memory[leanest] / memory[NO_HEAD]:.3f}",
        memory[leanest] <= MEMORY_OF_NO_HEAD * memory[NO_HEAD],
    )
    add(
        f"full softmax >= {MEMORY_UNDER_FULL} x its memory ({NO_HEAD} itself: {memory[FULL] / memory[NO_HEAD]:.1f})",
        f"{memory[FULL] / memory[leanest]:.1f}",
        memory[FULL] >= MEMORY_UNDER_FULL * memory[leanest],
    )
    fast = [name for name in folded if FAST in name]
    for name in fast:
        _, over_best, over_own = head_times(table, name)
        text = f"{over_best:.2f} ({over_own:.2f} over its products' own rates)"
        add(
            f"{name}: head alone <= {TIME_OVER_LOWER_BOUND} x its lower bound", text, over_best <= TIME_OVER_LOWER_BOUND
        )
    return "\n".join(lines)


def between(ratio: Ratio) -> str:
    """Median and range."""
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def optional(value: float, digits: int) -> str:
    """Nothing where there is no number."""
    return "" if pd.isna(value) else f"{value:.{digits}f}"
