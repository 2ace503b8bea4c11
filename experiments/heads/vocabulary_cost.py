"""What a head costs as the vocabulary grows: its time alone, the whole training step, and peak memory.

    python -m experiments vocabulary_cost measure [--rounds 3] [--budget-gib 4]
    python -m experiments vocabulary_cost draw

writes results/cost/vocabulary_cost.csv, one row a method, vocabulary size and round, the picture and a table with the
fitted exponents. Tokens follow Zipf's law (vocabfold/data/zipf.py), ids by falling frequency; groups have sqrt(V)
slots. A method whose training step, simulated, takes more than the budget is not run: it does not fit.
"""

from __future__ import annotations

import gc
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy import stats

from experiments.heads.training_sides import (
    CHUNKED,
    FULL,
    FULL_SETTINGS,
    HEADS,
    NO_HEAD,
    SCALE_SHIFT,
    Case,
    Side,
    loss_of,
)
from experiments.heads.training_step_words import optional
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, report, save
from experiments.study.measuring import (
    COST,
    add_rounds,
    add_sizes,
    identity,
    is_measured,
    measuring_device,
    model_of,
    write_measured,
)
from vocabfold.data.zipf import zipf_law, zipf_tokens
from vocabfold.errors import UserError
from vocabfold.machine import BYTES_PER_GIB, origin
from vocabfold.measure.memory import live_tensors, peak_memory_of
from vocabfold.measure.simulate import TrainingParts, simulated_peak_memory
from vocabfold.measure.speed import interleaved_seconds
from vocabfold.models.build import ModelSettings, build_model
from vocabfold.runs.tables import RESULTS

VOCABULARY_SIZES = (10_000, 50_257, 100_277, 500_000, 1_000_000)
LINEAR = "linear_sorted tied"
LOOKS = {
    FULL: ("full softmax", COLORS["red"], "s", "-"),
    CHUNKED: ("full, linear_cross_entropy", COLORS["orange"], "^", "--"),
    LINEAR: ("a linear layer a group, tied", COLORS["green"], "D", "-."),
    SCALE_SHIFT: ("one layer, scale and shift", COLORS["blue"], "o", "-"),
    NO_HEAD: ("no head", GREY, ".", ":"),
}
SLOW_SECONDS = 3.0  # a head whose step takes longer is not run at larger vocabularies
MOST_GROWTH = 0.6  # the goal: a folded head's time grows no faster than V to this power


def build_case(model: ModelSettings, vocabulary_size: int, batch_size: int, device: torch.device) -> Case:
    """A batch of Zipf's tokens."""
    length = model.max_positions
    law = zipf_law(vocabulary_size)
    tokens = np.concatenate(list(zipf_tokens(law, batch_size * (length + 1))))
    batch = torch.from_numpy(tokens).view(batch_size, length + 1).to(device)
    return Case(model, vocabulary_size, batch[:, :-1], batch[:, 1:], {})


def simulated_gib(case: Case, name: str) -> float:
    """Peak memory of a training step; for the chunked head, whose function has no simulation, that of the full one's
    parameters with no logits: what it needs at least."""

    def build() -> TrainingParts:
        model = build_model(case.model, HEADS.get(name, FULL_SETTINGS), case.vocabulary_size)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        return model, optimizer, partial(loss_of, model, case, name in (NO_HEAD, CHUNKED))

    return simulated_peak_memory(build).peak_bytes / BYTES_PER_GIB


def measure_size(
    case: Case, rounds: int, chunk_rows: int, budget_gib: float, too_slow: set[str]
) -> list[dict[str, object]]:
    """Rows of one vocabulary size: one a method and round, or one without seconds for a head that does not fit or is
    ``too_slow``, where names are added of heads whose step took longer than SLOW_SECONDS."""
    device = case.inputs.device
    rows: list[dict[str, object]] = []
    for name in LOOKS:
        simulated = simulated_gib(case, name)
        fits = simulated <= budget_gib
        row: dict[str, object] = {"method": name, "vocabulary_size": case.vocabulary_size, "fits": fits}
        row |= {"chunk_rows": chunk_rows if name == CHUNKED else None, "simulated_peak_memory_gib": simulated}
        if not fits or name in too_slow:
            rows.append(row)
            continue
        gc.collect()  # models refer to themselves: only one of a million tokens may be alive
        side = Side(case, name, chunk_rows)
        calls = {"seconds": side.step} | ({} if name == NO_HEAD else {"head_seconds": side.head_step})
        seconds = interleaved_seconds(calls, rounds, 1, device, progress=True)
        memory = peak_memory_of(side.step, device, live_tensors(side.model, side.optimizer))
        row["peak_memory_gib"] = memory.peak_bytes / BYTES_PER_GIB
        for round_index in range(rounds):
            measured = {column: values[round_index] for column, values in seconds.items()}
            rows.append(row | {"round": round_index} | measured)
        if max(seconds["seconds"]) > SLOW_SECONDS:
            too_slow.add(name)
        del side, calls
    return rows


def medians(table: pd.DataFrame, name: str, column: str) -> pd.Series:
    """By vocabulary size, of the rounds of one head that ran."""
    rows = table[(table["method"] == name) & table["fits"]]
    result: pd.Series = rows.groupby("vocabulary_size")[column].median().dropna()
    return result


def growth(values: pd.Series) -> tuple[float, float]:
    """(b, half width of its 95% interval) of values = a V^b, least squares of the logarithms; NaN below three sizes."""
    if len(values) < 3:
        return float("nan"), float("nan")
    fit = stats.linregress(np.log(values.index.to_numpy(dtype=float)), np.log(values.to_numpy()))
    return float(fit.slope), float(stats.t.ppf(0.975, len(values) - 2) * fit.stderr)


def describe(table: pd.DataFrame) -> str:
    """Milliseconds of the head alone and of the whole step, GiB, and exponents, by vocabulary size."""
    sizes = sorted(table["vocabulary_size"].unique())
    blocks = (("head alone (ms)", "head_seconds", 1e3, 1), ("whole step (ms)", "seconds", 1e3, 0))
    lines = []
    for title, column, factor, digits in (*blocks, ("peak memory (GiB)", "peak_memory_gib", 1.0, 3)):
        lines += [f"| {title} | {' | '.join(f'V = {size:,}' for size in sizes)} | grows as V to the |"]
        lines += ["|---" * (len(sizes) + 2) + "|"]
        for name in LOOKS:
            if column == "head_seconds" and name == NO_HEAD:
                continue
            values = medians(table, name, column)
            fits = table[table["method"] == name].groupby("vocabulary_size")["fits"].first()
            missing = {size: "too slow" if fits[size] else "does not fit" for size in sizes}
            cells = [optional(factor * values[size], digits) if size in values else missing[size] for size in sizes]
            power, half_width = growth(values)
            exponent = "" if np.isnan(power) else f"{power:.2f} ± {half_width:.2f}"
            lines.append(f"| {name} | {' | '.join(cells)} | {exponent} |")
        lines.append("")
    lines += ["| goal | reached | |", "|---|---|---|"]
    for name in (SCALE_SHIFT, LINEAR):
        values = medians(table, name, "head_seconds")
        power, half_width = growth(values)
        ends = np.log(values.iloc[-1] / values.iloc[0]) / np.log(values.index[-1] / values.index[0])
        verdict = "met" if max(power, ends) <= MOST_GROWTH else "**not met**"
        lines.append(
            f"| {name}: head time grows at most as V^{MOST_GROWTH} | fitted {power:.2f} ± {half_width:.2f}, from "
            f"{values.index[0]:,} to {values.index[-1]:,} tokens {ends:.2f} | {verdict} |"
        )
    return "\n".join(lines)


def draw_growth(table: pd.DataFrame, path: Path) -> None:
    """Head time, step time and memory against V."""
    panels = (("head_seconds", "Head alone (s)"), ("seconds", "Training step (s)"), ("peak_memory_gib", "Peak (GiB)"))
    figure, axes = plt.subplots(1, 3, figsize=(2 * COLUMN_INCHES, 2.5))
    for axis, (column, quantity) in zip(axes, panels, strict=True):
        for name, (label, color, marker, line) in LOOKS.items():
            values = medians(table, name, column)
            if len(values) > 0:
                axis.plot(values.index, values, color=color, marker=marker, linestyle=line, label=label)
        axis.set(xscale="log", yscale="log", xlabel="Vocabulary V", ylabel=quantity)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    first = table.iloc[0]
    figure.suptitle(
        f"Hidden {first['hidden_size']}, {first['num_layers']} layers, {first['tokens']:,} Zipf tokens a step",
        fontsize=7,
    )
    save(figure, path)


def add_options(parser: ArgumentParser) -> None:
    """Rounds, sizes and the budget."""
    add_rounds(parser, 3)
    add_sizes(parser, ModelSettings(hidden_size=64, num_layers=4, num_heads=4), batch_size=4)
    parser.add_argument("--chunk-rows", type=int, default=128, help="of torch's linear_cross_entropy")
    parser.add_argument("--budget-gib", type=float, default=4.0, help="most memory of a step, default %(default)s GiB")
    parser.add_argument("--sizes", type=int, nargs="+", default=VOCABULARY_SIZES, help="vocabulary sizes")


def measure(arguments: Namespace) -> None:
    """Time every head at every size that fits, and write the table."""
    if len(set(arguments.sizes)) < 2 or min(arguments.sizes) < 2:
        raise UserError("--sizes needs at least two different vocabulary sizes, each of at least two tokens")
    path, measurement = COST / "vocabulary_cost.csv", identity("vocabulary_cost", arguments)
    if is_measured(path, measurement, timed=True):
        return
    device = measuring_device()
    rows: list[dict[str, object]] = []
    too_slow: set[str] = set()
    for vocabulary_size in sorted(set(arguments.sizes)):
        case = build_case(model_of(arguments), vocabulary_size, arguments.batch_size, device)
        rows += measure_size(case, arguments.rounds, arguments.chunk_rows, arguments.budget_gib, too_slow)
    table = pd.DataFrame(rows).assign(
        tokens=arguments.batch_size * arguments.sequence_length,
        hidden_size=arguments.hidden_size,
        num_layers=arguments.num_layers,
        budget_gib=arguments.budget_gib,
        **origin(),
    )
    write_measured(table, path, measurement)


def draw(corpus: str) -> None:
    """Write the picture and the table in words."""
    report(RESULTS / corpus / "vocabulary_cost.csv", markdown, draw_growth, ("method", "head_seconds"))


def markdown(table: pd.DataFrame) -> str:
    """The table, the goals, and what was measured how."""
    first, chunks = table.iloc[0], table["chunk_rows"].dropna()
    setting = (
        f"Hidden {first['hidden_size']}, {first['num_layers']} layers, {first['tokens']:,} tokens a step, fp32, fused "
        f"Adam, Zipf's tokens, S = sqrt(V), linear_cross_entropy in chunks of {chunks.iloc[0]:.0f} rows; medians of "
        f"{table['round'].nunique()} rounds, one head after the other. Exponents with 95% intervals: least squares of "
        "logarithms, Student's t. Does not fit: a step takes more than "
        f"{first['budget_gib']:g} GiB; too slow: at a smaller vocabulary it took more than {SLOW_SECONDS:g} s.\n"
        f"{first['hardware']}; torch {first['torch']}.\n"
    )
    return f"{describe(table)}\n\n{setting}"
