"""Rows a chunk of the chunked head: seconds and peak memory of one loss with its gradients, in one interleaved run.

    python -m experiments chunk_rows [--scale laptop] [--hidden-size 128] [--rounds 3]

writes results/SCALE/chunk_rows.csv, one row a side and round (rows of other hidden sizes stay), and prints each side's
ratio to the full softmax.
``automatic`` leaves the chunk to torch.
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import pandas as pd
import torch
from torch import nn

from experiments.study.program import measuring_device, measuring_parser
from vocabfold.command_line import one_line_errors
from vocabfold.files import write_text
from vocabfold.heads import ChunkedHead, FullHead, Head
from vocabfold.machine import BYTES_PER_GIB, origin
from vocabfold.measure.memory import peak_memory_of
from vocabfold.measure.speed import interleaved_seconds, ratio_summary
from vocabfold.runs.record import RESULTS

VOCABULARY_SIZE, NUM_TOKENS = 50_257, 4096
CHUNK_ROWS = (32, 64, 128, 256, 512, 1024)


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    parser = measuring_parser(__doc__, rounds=3)
    parser.add_argument("--hidden-size", type=int, default=128)
    arguments = parser.parse_args()
    device = measuring_device()
    hidden_size = arguments.hidden_size
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

    sides = {name: lambda head=head: step(head) for name, head in heads.items()}
    seconds = interleaved_seconds(sides, arguments.rounds, 1, device, progress=True)
    rows: list[dict[str, object]] = []
    for name, values in seconds.items():
        peak_memory = peak_memory_of(sides[name], device, [weight, hidden, targets]).peak_bytes / BYTES_PER_GIB
        rows += [
            {"side": name, "round": round_index, "seconds": value, "peak_memory_gib": peak_memory}
            for round_index, value in enumerate(values)
        ]
        ratio = ratio_summary(seconds, "full", name)
        median = pd.Series(values).median()
        print(
            f"{name:>10}: {median:.2f} s, {peak_memory:.3f} GiB, "
            f"speed {ratio.median:.2f} of the full softmax ({ratio.low:.2f} to {ratio.high:.2f})"
        )
    table = pd.DataFrame(rows).assign(
        hidden_size=hidden_size,
        tokens=NUM_TOKENS,
        **origin("chunk_rows"),
    )
    path = RESULTS / arguments.scale / "chunk_rows.csv"
    if path.is_file():
        before = pd.read_csv(path)
        table = pd.concat([before[before["hidden_size"] != hidden_size], table])
    write_text(path, table.to_csv(index=False))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
