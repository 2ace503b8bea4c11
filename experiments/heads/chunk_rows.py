"""Rows a chunk of the chunked head: seconds and peak memory of one loss with its gradients, in one interleaved run.

    python -m experiments chunk_rows measure [--hidden-size 128] [--rounds 3]

writes results/cost/chunk_rows.csv, one row a method and round (rows of other sizes stay), and prints each method's
ratio to the full softmax. A method is the full softmax, a number of rows, or ``automatic``: torch chooses the chunk.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import pandas as pd
import torch
from torch import nn

from experiments.study.measuring import COST, add_rounds, identity, is_measured, measuring_device, write_measured
from vocabfold.heads import ChunkedHead, FullHead, Head
from vocabfold.machine import BYTES_PER_GIB, origin
from vocabfold.measure.memory import peak_memory_of
from vocabfold.measure.speed import interleaved_seconds, ratio_summary

VOCABULARY_SIZE, NUM_TOKENS = 50_257, 4096
CHUNK_ROWS = (32, 64, 128, 256, 512, 1024)


def add_options(parser: ArgumentParser) -> None:
    """Rounds and the size."""
    add_rounds(parser, 3)
    parser.add_argument("--hidden-size", type=int, default=128, help="default %(default)s")


def measure(arguments: Namespace) -> None:
    """Time every number of rows and write the table."""
    path, measurement = COST / "chunk_rows.csv", identity("chunk_rows", arguments)
    if is_measured(path, measurement, timed=True):
        return
    device, hidden_size = measuring_device(), arguments.hidden_size
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(VOCABULARY_SIZE, hidden_size, device=device) * 0.02)
    hidden = torch.randn(NUM_TOKENS, hidden_size, device=device, requires_grad=True)
    targets = torch.randint(VOCABULARY_SIZE, (NUM_TOKENS,), device=device)
    heads: dict[str, Head] = {"full": FullHead(hidden_size, VOCABULARY_SIZE, weight)}
    for chunk_rows in CHUNK_ROWS:
        heads[f"{chunk_rows}"] = ChunkedHead(hidden_size, VOCABULARY_SIZE, weight, chunk_rows=chunk_rows)
    automatic = ChunkedHead(hidden_size, VOCABULARY_SIZE, weight)
    automatic.options = nn.LinearCrossEntropyOptions()
    heads["automatic"] = automatic

    def step(head: Head) -> None:
        weight.grad = hidden.grad = None
        head.loss(hidden, targets).loss.backward()

    methods = {name: lambda head=head: step(head) for name, head in heads.items()}
    seconds = interleaved_seconds(methods, arguments.rounds, 1, device, progress=True)
    rows: list[dict[str, object]] = []
    for name, values in seconds.items():
        peak_memory = peak_memory_of(methods[name], device, [weight, hidden, targets]).peak_bytes / BYTES_PER_GIB
        rows += [
            {"method": name, "round": round_index, "seconds": value, "peak_memory_gib": peak_memory}
            for round_index, value in enumerate(values)
        ]
        ratio = ratio_summary(seconds, "full", name)
        median = pd.Series(values).median()
        print(
            f"{name:>10}: {median:.2f} s, {peak_memory:.3f} GiB, "
            f"speed {ratio.median:.2f} of the full softmax ({ratio.low:.2f} to {ratio.high:.2f})"
        )
    table = pd.DataFrame(rows).assign(hidden_size=hidden_size, tokens=NUM_TOKENS, **origin())
    write_measured(table, path, measurement, beside="hidden_size")
