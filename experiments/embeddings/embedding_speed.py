"""How fast embeddings are, in interleaved runs: batched TT-SVD against tensorly's loop, lookups, training steps.

    python -m experiments embedding_speed measure [--rounds 5]
    python -m experiments embedding_speed draw

writes results/cost/embedding_speed.csv, one row a part, method and round, and .md with the ratios. tensorly
(pip install tensorly) decomposes a sample of the rows, and its seconds are scaled up to the table.
"""

from __future__ import annotations

import functools
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

import pandas as pd
import torch
from torch import nn

from experiments.study.figures import read_measured
from experiments.study.measuring import COST, add_rounds, identity, is_measured, write_measured
from vocabfold.embeddings import EmbeddingSettings, build_embedding, compress_table
from vocabfold.embeddings.tt_svd import tt_svd
from vocabfold.files import write_text
from vocabfold.machine import matrix_rate_flops_per_second, origin
from vocabfold.measure.allocator import keep_freed_memory
from vocabfold.measure.flops import count_flops
from vocabfold.measure.speed import interleaved_seconds, ratio_summary
from vocabfold.runs.tables import RESULTS

VOCABULARY_SIZE, HIDDEN_SIZE, NUM_LOOKUPS = 50_257, 768, 16_384
TENSORLY_ROWS = 400
SHAPES: dict[str, tuple[list[int], list[int]]] = {
    "24x32 r4": ([24, 32], [4]),
    "8x8x12 r4": ([8, 8, 12], [4, 4]),
    "2^8x3 r1": ([2] * 8 + [3], [1] * 8),
    "2^8x3 r2": ([2] * 8 + [3], [2] * 8),
}
CPU = torch.device("cpu")


def svd_seconds(table: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds for the whole table: "SHAPE, batched" and "SHAPE, tensorly"."""
    from tensorly.decomposition import tensor_train  # an extra; only this experiment measures against it

    sample = table[:TENSORLY_ROWS].numpy()
    methods: dict[str, Callable[[], object]] = {}
    for name, (sizes, ranks) in SHAPES.items():

        def loop(sizes: list[int] = sizes, ranks: list[int] = ranks) -> None:
            for row in sample:
                tensor_train(row.reshape(sizes), [1, *ranks, 1])

        methods[f"{name}, batched"] = functools.partial(tt_svd, table, sizes, ranks)
        methods[f"{name}, tensorly"] = loop
    seconds = interleaved_seconds(methods, rounds, 0, CPU, progress=True)
    whole = VOCABULARY_SIZE / TENSORLY_ROWS
    return {name: [value * (whole if "tensorly" in name else 1) for value in s] for name, s in seconds.items()}


def lookup_seconds(table: torch.Tensor, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds and FLOPs of NUM_LOOKUPS lookups."""
    settings = {"dense": EmbeddingSettings()}
    for name, (sizes, ranks) in SHAPES.items():
        settings[f"tensor_train {name}"] = EmbeddingSettings(name="tensor_train", mode_sizes=sizes, ranks=ranks)
    settings["tt_matrix 16x"] = EmbeddingSettings(name="tt_matrix", compression=16.0)
    settings["low_rank 4x"] = EmbeddingSettings(name="low_rank", compression=4.0)
    settings["int8"] = EmbeddingSettings(name="int8")
    settings["int4"] = EmbeddingSettings(name="int4", group_size=32)
    ids = torch.randint(VOCABULARY_SIZE, (NUM_LOOKUPS,), generator=torch.Generator().manual_seed(0))
    methods, flops = {}, {}
    with torch.no_grad():
        for name, some in settings.items():
            quantised = some.name.startswith("int")
            embedding = compress_table(some, table) if quantised else build_embedding(some, *table.shape)
            embedding.prepare_for_inference()
            methods[name] = lambda embedding=embedding: embedding(ids)
            flops[name] = count_flops(methods[name])
        return interleaved_seconds(methods, rounds, 2, CPU, progress=True), flops


def step_seconds(rounds: int) -> dict[str, list[float]]:
    """Seconds of a lookup of 2,048 ids of 64 numbers, its backward pass and Adam's step on the embedding alone."""
    settings = {
        "dense": EmbeddingSettings(),
        "tensor_train 4x": EmbeddingSettings(name="tensor_train", compression=4.0),
        "tt_matrix 16x": EmbeddingSettings(name="tt_matrix", compression=16.0),
        "low_rank 4x": EmbeddingSettings(name="low_rank", compression=4.0),
        "int8": EmbeddingSettings(name="int8"),
        "int4": EmbeddingSettings(name="int4", group_size=32),
    }
    ids = torch.randint(VOCABULARY_SIZE, (2048,), generator=torch.Generator().manual_seed(0))
    direction = torch.randn(2048, 64)
    methods = {}
    for name, some in settings.items():
        embedding: nn.Module = build_embedding(some, VOCABULARY_SIZE, 64)
        optimizer = torch.optim.Adam(embedding.parameters(), foreach=True)

        def step(embedding: nn.Module = embedding, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            (embedding(ids) * direction).sum().backward()
            optimizer.step()

        methods[name] = step
    return interleaved_seconds(methods, rounds, 2, CPU, progress=True)


def add_options(parser: ArgumentParser) -> None:
    """Rounds."""
    add_rounds(parser, 5)


def measure(arguments: Namespace) -> None:
    """Time every part and write the table."""
    path, measurement = COST / "embedding_speed.csv", identity("embedding_speed", arguments)
    if is_measured(path, measurement, timed=True):
        return
    keep_freed_memory()
    torch.manual_seed(0)
    table = torch.randn(VOCABULARY_SIZE, HIDDEN_SIZE)
    parts = {"svd": svd_seconds(table, arguments.rounds)}
    parts["lookup"], flops = lookup_seconds(table, arguments.rounds)
    parts["step"] = step_seconds(arguments.rounds)
    rows = [
        {"part": part, "method": method, "round": index, "seconds": value}
        | {"flops": flops.get(method) if part == "lookup" else None}
        for part, seconds in parts.items()
        for method, values in seconds.items()
        for index, value in enumerate(values)
    ]
    measured = {"matrix_rate_flops_per_second": matrix_rate_flops_per_second(CPU, torch.float32)}
    measured |= {"threads": torch.get_num_threads()}
    write_measured(pd.DataFrame(rows).assign(**measured, **origin()), path, measurement)


def draw(corpus: str) -> None:
    """Write the table in words."""
    path = RESULTS / corpus / "embedding_speed.csv"
    words = markdown(read_measured(path, ("method", "flops", "matrix_rate_flops_per_second")))
    write_text(path.with_suffix(".md"), words)
    print(words + f"wrote {path.with_suffix('.md')}")


def markdown(table: pd.DataFrame) -> str:
    """Medians and ratios of each part."""
    parts = {
        str(part): {str(method): of["seconds"].tolist() for method, of in rows.groupby("method", sort=False)}
        for part, rows in table.groupby("part")
    }
    first = table.iloc[0]
    rate = first["matrix_rate_flops_per_second"]
    flops = table[table["part"] == "lookup"].groupby("method")["flops"].first()
    lines = [f"TT-SVD of {VOCABULARY_SIZE:,} x {HIDDEN_SIZE}, seconds (medians of rounds).", ""]
    lines += ["| shape | tensorly's loop | batched | times faster |", "|---|---|---|---|"]
    for shape in SHAPES:
        loop, batched = (parts["svd"][f"{shape}, {method}"] for method in ("tensorly", "batched"))
        ratio = ratio_summary(parts["svd"], f"{shape}, tensorly", f"{shape}, batched")
        lines.append(
            f"| {shape} | {pd.Series(loop).median():.2f} | {pd.Series(batched).median():.2f} "
            f"| {ratio.median:.1f} ({ratio.low:.1f} to {ratio.high:.1f}) |"
        )
    lines += ["", f"Lookup of {NUM_LOOKUPS:,} ids, D = {HIDDEN_SIZE}; bound: 3 dense lookups and the FLOPs at the "]
    lines[-1] += f"machine's matrix rate of {rate / 1e9:.0f} GFLOP/s."
    lines += ["", "| embedding | ms | dense = 1 | share of the bound |", "|---|---|---|---|"]
    dense = pd.Series(parts["lookup"]["dense"]).median()
    for method, values in parts["lookup"].items():
        median, ratio = pd.Series(values).median(), ratio_summary(parts["lookup"], method, "dense")
        share = median / (3 * dense + flops[method] / rate)
        times = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        lines.append(f"| {method} | {1e3 * median:.1f} | {times} | {share:.2f} |")
    lines += ["", "Lookup of 2,048 ids, D = 64, backward pass and Adam's step.", "", "| embedding | ms | dense = 1 |"]
    lines.append("|---|---|---|")
    for method, values in parts["step"].items():
        ratio = ratio_summary(parts["step"], method, "dense")
        median = 1e3 * pd.Series(values).median()
        lines.append(f"| {method} | {median:.1f} | {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) |")
    where = f"{first['hardware']}, {first['threads']} thread(s); torch {first['torch']}."
    return "\n".join([*lines, "", where, ""])
