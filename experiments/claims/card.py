"""What one card measured of Tables 2 and 3 of arXiv 2411.06371: results/cards/gpu_steps.csv, this project's models."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from experiments.cards import gpu_steps
from experiments.cards.gpu_steps import BF16, CAPTURED, EAGER, FORWARD, FP32, STEP
from experiments.cards.gpu_summary import chosen, ratio, summary_of
from experiments.claims.base import measured

COMMAND = "python -m experiments gpu measure"
SIDES = {"gpt2": gpu_steps.FULL, "gpt_neo": gpu_steps.FULL_NEO, "grouped": gpu_steps.PAPER}
COLUMNS = (*gpu_steps.KEYS, "milliseconds", "peak_memory_gib", "status", "hardware")
Ratio = tuple[float, float, float]  # median, 2.5 and 97.5% over rounds that took turns


def card_steps() -> pd.DataFrame:
    """A row a side, size, precision, mode and pass. Raises UserError where the table is missing."""
    return summary_of(measured("cards", "gpu_steps", COMMAND, COLUMNS), gpu_steps.KEYS)


def step_of(
    steps: pd.DataFrame, model: str, hidden_size: int, precision: str, part: str = STEP, mode: str = EAGER
) -> pd.Series | None:
    """Of "gpt2", "gpt_neo" or "grouped"; None where it was not measured."""
    wanted = {"hidden_size": hidden_size, "precision": precision, "mode": mode, "pass": part}
    return chosen(steps, side=SIDES[model], **wanted)


def card_memory(steps: pd.DataFrame, hidden_size: int) -> dict[str, float] | None:
    """GiB allocated at the peak of a step in float32, by model; None where one was not measured."""
    rows = {model: step_of(steps, model, hidden_size, FP32) for model in SIDES}
    found = {model: float(row["peak_memory_gib"]) for model, row in rows.items() if row is not None}
    return found if len(found) == len(SIDES) else None


def card_speed_ups(steps: pd.DataFrame, hidden_size: int) -> Iterator[tuple[str, Ratio]]:
    """(in words, how many times as fast as GPT-2 the grouped model is) for each pass that was measured."""
    for part, mode, words in (
        (FORWARD, EAGER, "forward only"),
        (STEP, EAGER, "whole step"),
        (STEP, CAPTURED, "whole step as a CUDA graph"),
    ):
        for precision in (FP32, BF16):
            full, grouped = (step_of(steps, model, hidden_size, precision, part, mode) for model in ("gpt2", "grouped"))
            if (faster := ratio(full, grouped)) is not None:
                yield f"{words}, {precision}", faster


def forward_tokens_per_second(steps: pd.DataFrame, model: str, hidden_size: int) -> float | None:
    """Of the forward pass in float32, which is what Table 3 prints; None where it was not measured."""
    row = step_of(steps, model, hidden_size, FP32, FORWARD)
    return None if row is None else 1e3 * float(row["batch_size"] * row["sequence_length"] / row["median"])


def card_name(steps: pd.DataFrame) -> str:
    """The card, as its driver calls it."""
    return str(steps["hardware"].iloc[-1]).rsplit(" x ", 1)[-1]
