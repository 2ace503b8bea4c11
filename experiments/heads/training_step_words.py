"""The table of training_step in words: ratios of the rounds, lower bounds of a head, and the goals met."""

from __future__ import annotations

from statistics import median

import pandas as pd

from experiments.heads.training_sides import (
    BESIDE_FULL,
    CHUNKED,
    DEFAULT_ALLOCATOR,
    FAST,
    FULL,
    HEAD_ROUNDS,
    NO_HEAD,
    SCALE_SHIFT,
)
from vocabfold.measure.speed import Ratio, ratio_summary, tokens_per_second

SPEED_OVER_FULL, SPEED_OVER_CHUNKED, SPEED_OF_NO_HEAD = 7.0, 2.6, 0.97
MEMORY_OF_NO_HEAD, MEMORY_UNDER_FULL, TIME_OVER_LOWER_BOUND = 1.05, 8.0, 2.0


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
