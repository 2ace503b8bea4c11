"""One training step with each head, in one interleaved run: seconds, memory, floors, and the goals that they meet.

    python -m experiments training_step [--scale laptop] [--rounds 5] [--train FILE]

writes results/SCALE/training_step.csv, one row a head and round, and a table with the goals beside it. ``free`` is the
same backbone with a head that costs nothing: no head can be faster or leaner. "As usual" is a process of its own whose
allocator gives freed memory back to the system, as every program's does that does not call vocabfold.measure.allocator.
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median

import pandas as pd
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from experiments.heads.step_report import AS_USUAL, BESIDE_FULL, CHUNKED, FREE, FULL, SCALE_SHIFT, describe, goals
from experiments.study.floor import least_bytes, products_of
from experiments.study.other_process import OtherProcess
from experiments.study.program import add_sizes, measuring_device, measuring_parser, model_of
from vocabfold.command_line import one_line_errors
from vocabfold.data.corpora import Corpus, load_corpus
from vocabfold.files import write_text
from vocabfold.heads import HeadSettings
from vocabfold.heads.settings import PartitionSettings
from vocabfold.machine import (
    BYTES_PER_GIB,
    hardware,
    matrix_rate_flops_per_second,
    memory_bandwidth_bytes_per_second,
    origin,
    torch_version,
)
from vocabfold.measure.memory import live_tensors, peak_memory_of
from vocabfold.measure.speed import interleaved_seconds
from vocabfold.models.build import ModelSettings, ModelWithHead, build_model
from vocabfold.runs.record import RESULTS
from vocabfold.runs.settings import CONFIG_FOLDER
from vocabfold.runs.token_order import token_order

CHUNKS = (256, 1024, 2048)  # rows at a time of torch's linear_cross_entropy: the fastest is compared
HEAD_ROUNDS = 15  # of the folded heads alone, after the steps: they take milliseconds
FULL_SETTINGS = HeadSettings(name="full", tied=True)


def folded(scorer: str, tied: bool, order: str = "bpe", shortlist: int = 0) -> HeadSettings:
    """A folded head with groups of the default size."""
    return HeadSettings("grouped", tied, scorer=scorer, partition=PartitionSettings(order, shortlist=shortlist))


HEADS = {
    SCALE_SHIFT: folded("scale_shift_sorted", tied=False),
    "scale_shift": folded("scale_shift", tied=False),
    "low_rank_sorted": folded("low_rank_sorted", tied=False),
    "linear_sorted tied": folded("linear_sorted", tied=True),
    "linear_sorted tied, frequency": folded("linear_sorted", True, "frequency"),
    "linear_sorted tied, frequency, shortlist 512": folded("linear_sorted", True, "frequency", 512),
    "linear_sorted tied, frequency, shortlist 2048": folded("linear_sorted", True, "frequency", 2048),
    "linear_sorted free": folded("linear_sorted", tied=False),
}


@dataclass(frozen=True)
class Case:
    """What every process needs to build the same sides: sizes, the batch [B, T] and its targets, orders by name."""

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
            settings = HeadSettings(name="chunked", tied=True, chunk_rows=chunk_rows)
        self.model = build_model(case.model, settings, case.vocabulary_size, case.orders.get(name))
        self.model.to(case.inputs.device)
        self.case, self.free = case, name == FREE
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)  # as optimizer.py has it
        self.hidden = torch.randn(case.inputs.numel(), case.model.hidden_size, device=case.inputs.device)
        self.hidden.requires_grad_()

    def loss(self) -> Tensor:
        """Of the whole model."""
        return loss_of(self.model, self.case, self.free)

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


def loss_of(model: ModelWithHead, case: Case, free: bool) -> Tensor:
    """The head's loss, or without a head the mean of the hidden states: it only has to send gradients back."""
    if free:
        hidden: Tensor = model.backbone(case.inputs)
        return hidden.mean()
    loss: Tensor = model(case.inputs, case.targets).loss
    return loss


def usual_steps(case: Case) -> dict[str, Callable[[], None]]:
    """The steps that run in a process with the usual allocator."""
    return {name: Side(case, name).step_and_release for name in (FULL, SCALE_SHIFT)}


def fastest_chunk(case: Case) -> int:
    """The chunk of CHUNKS with which the head alone is fastest."""
    sides = {str(rows): Side(case, CHUNKED, rows).head_step for rows in CHUNKS}
    seconds = interleaved_seconds(sides, rounds=2, warmup=1, device=case.inputs.device, progress=True)
    return min(CHUNKS, key=lambda rows: median(seconds[str(rows)]))


def measure(case: Case, rounds: int) -> pd.DataFrame:
    """One row a side and round."""
    device = case.inputs.device
    on_cpu = device.type == "cpu"
    chunk_rows = fastest_chunk(case)
    rate = matrix_rate_flops_per_second(device, torch.float32)
    bandwidth = memory_bandwidth_bytes_per_second(device)
    sides = {name: Side(case, name, chunk_rows) for name in (FULL, CHUNKED, *HEADS, FREE)}
    calls: dict[str, Callable[[], None]] = {name: side.step_and_release for name, side in sides.items() if name != FULL}
    heads = {name: sides[name].head_step for name in HEADS}
    with OtherProcess(usual_steps, case) if on_cpu else nullcontext() as other:  # an allocator of the CPU alone
        if other is not None:
            calls |= {name + AS_USUAL: partial(other.call, name) for name in (FULL, SCALE_SHIFT)}
        seconds = interleaved_seconds(calls, rounds, 1, device, progress=True)
    # Two full softmaxes at once, one of which keeps its memory, are more than a small machine holds: a run of its own.
    kept = {FULL: sides[FULL].step_and_release, SCALE_SHIFT + BESIDE_FULL: sides[SCALE_SHIFT].step_and_release}
    seconds |= interleaved_seconds(kept, rounds, 1, device, progress=True)
    head_seconds = interleaved_seconds(heads, HEAD_ROUNDS, 3, device, progress=True)
    rows = []
    for call in [*calls, *kept]:
        name = call.removesuffix(AS_USUAL).removesuffix(BESIDE_FULL)
        side = sides[name]
        memory = peak_memory_of(side.step, device, live_tensors(side.model, side.optimizer))
        row: dict[str, object] = {"side": call, "chunk_rows": chunk_rows if name == CHUNKED else None}
        row |= {"tokens": case.inputs.numel(), "peak_memory_gib": memory.peak_bytes / BYTES_PER_GIB}
        row |= {"matrix_rate_flops_per_second": rate, "bandwidth_bytes_per_second": bandwidth}
        if call in HEADS:
            products = products_of(side.head_step, device)
            row |= {"head_flops": products.flops, "head_products_seconds": products.seconds}
            row |= {"head_bytes": least_bytes(side.head_inputs()), "head_seconds": median(head_seconds[call])}
        rows += [row | {"round": index, "seconds": value} for index, value in enumerate(seconds[call])]
    return pd.DataFrame(rows)


def load_tokens(text: str | None) -> Corpus:
    """The embedded stories, or a local text. Raises UserError where the text cannot be read."""
    data = OmegaConf.load(CONFIG_FOLDER / "data" / ("stories.yaml" if text is None else "text.yaml"))
    if text is not None:
        data.train = data.valid = text
    return load_corpus(OmegaConf.to_container(data, resolve=True))  # type: ignore[arg-type]


def build_case(model: ModelSettings, corpus: Corpus, tokens: Tensor, batch_size: int, device: torch.device) -> Case:
    """The first sequences of the corpus as one batch, and each head's order, counted on all of it."""
    length = model.max_positions + 1
    batch = tokens[: batch_size * length].view(batch_size, length).to(device)
    orders = {
        name: token_order(settings, corpus.vocabulary_size, corpus.train.tokens) for name, settings in HEADS.items()
    }
    return Case(model, corpus.vocabulary_size, batch[:, :-1], batch[:, 1:], orders)


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    parser = measuring_parser(__doc__, rounds=5)
    parser.add_argument(
        "--train", help="a local text, documents between <|endoftext|> lines (default: embedded stories)"
    )
    add_sizes(parser, ModelSettings(), batch_size=8)
    arguments = parser.parse_args()
    device = measuring_device()
    corpus = load_tokens(arguments.train)
    most = arguments.batch_size * (arguments.sequence_length + 1)
    tokens = torch.from_numpy(corpus.train.tokens[:most].astype("int64"))
    case = build_case(model_of(arguments), corpus, tokens, arguments.batch_size, device)
    table = measure(case, arguments.rounds)
    table = table.assign(
        corpus=corpus.name,
        hidden_size=arguments.hidden_size,
        num_layers=arguments.num_layers,
        **origin("training_step"),
    )
    path = RESULTS / arguments.scale / "training_step.csv"
    write_text(path, table.to_csv(index=False))
    distinct = len(case.targets.unique())
    setting = (
        f"Hidden {arguments.hidden_size}, {arguments.num_layers} layers, V = {corpus.vocabulary_size:,}, batch "
        f"{arguments.batch_size} x {arguments.sequence_length}, fp32, fused Adam; {arguments.rounds} interleaved "
        "rounds: median of the rounds' ratios and their 2.5 to 97.5% range; heads alone: median of "
        f"{HEAD_ROUNDS} rounds.\n"
        f"Tokens: the first of {corpus.name}, real text and not random ones; {distinct:,} different targets in the "
        f"batch. {hardware()}; torch {torch_version()}.\n"
    )
    words = f"{describe(table)}\n\n{setting}\n{goals(table)}\n"
    write_text(path.with_suffix(".md"), words)
    print(words + f"wrote {path}")


if __name__ == "__main__":
    main()
