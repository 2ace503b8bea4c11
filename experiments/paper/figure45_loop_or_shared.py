"""Figures 4 and 5 of arXiv 2411.06371: one linear layer a group in a loop, or one shared layer, scaled and shifted.

    python -m experiments figure45_loop_or_shared measure [--rounds 7] [KEY=VALUE ...]
    python -m experiments figure45_loop_or_shared draw

times the two published listings against each other and against our sorted form of each: results/cost/
figure45_loop_or_shared.csv, one row a scorer, size, pass and round, the picture and the table. The head stands alone on
random hidden states, with the first tokens of a real text as targets in token-id order, as published: over tokens N at
S = 225 and over group sizes S at N = 4,096.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter
from torch import Tensor
from tqdm import tqdm

from experiments.heads.training_step import first_tokens
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, read_measured, save
from experiments.study.measuring import (
    COST,
    add_rounds,
    add_settings,
    at_least_one,
    composed,
    identity,
    is_measured,
    measuring_device,
    text_of,
    write_measured,
)
from vocabfold.data.corpora import Corpus, load_corpus
from vocabfold.files import write_text
from vocabfold.heads import (
    FoldedHead,
    LoopedLinearScorer,
    ScaleShiftScorer,
    SortedLinearScorer,
    SortedScaleShiftScorer,
    TokenScorer,
    equal_partition,
)
from vocabfold.machine import BYTES_PER_GIB, origin
from vocabfold.measure.memory import peak_memory_of
from vocabfold.measure.speed import interleaved_seconds, ratio_summary
from vocabfold.runs.tables import RESULTS

NAME = "figure45_loop_or_shared"
TOKENS, GROUP_SIZES = (256, 1024, 4096, 16384), (14, 56, 225, 900, 3864)
LOOP, SHARED = "linear_looped", "scale_shift"
SCORERS: dict[str, tuple[type[TokenScorer], str, str, str]] = {
    LOOP: (LoopedLinearScorer, "a layer a group, looped (Figure 4)", COLORS["red"], "s"),
    SHARED: (ScaleShiftScorer, "one shared layer (Figure 5)", COLORS["orange"], "^"),
    "linear_sorted": (SortedLinearScorer, "a layer a group, sorted", COLORS["green"], "D"),
    "scale_shift_sorted": (SortedScaleShiftScorer, "one shared layer, sorted", COLORS["blue"], "o"),
}
FORWARD, BOTH = "forward", "forward and backward"
PASSES: dict[str, Any] = {BOTH: "-", FORWARD: ":"}
POINT = ["tokens", "group_size"]


class LoneHead:
    """A head without a model: its loss of ``targets`` [N] on hidden states [N, D], forward alone and both ways."""

    def __init__(self, scorer: type[TokenScorer], hidden: Tensor, targets: Tensor, vocabulary_size: int, slots: int):
        hidden_size = hidden.shape[-1]
        partition = equal_partition(vocabulary_size, slots)
        # Every scorer takes (D, partition), which the base class, having no parameters, does not say.
        build: Callable[..., TokenScorer] = scorer
        self.head = FoldedHead(hidden_size, partition, build(hidden_size, partition)).to(hidden.device)
        self.hidden, self.targets = hidden.clone().requires_grad_(), targets
        self.num_groups = partition.num_groups
        self.groups_seen = len(self.head.partition.group_of[targets].unique())

    def forward(self) -> None:
        """The loss, with nothing kept for a backward pass."""
        with torch.no_grad():
            self.head.loss(self.hidden, self.targets)

    def forward_and_backward(self) -> None:
        """The loss and the gradients of the hidden states and of the head."""
        self.release()
        self.head.loss(self.hidden, self.targets).loss.backward()

    def release(self) -> None:
        """Let the gradients go."""
        self.hidden.grad = None
        self.head.zero_grad(set_to_none=True)

    def live(self) -> list[Tensor]:
        """What is there before a pass."""
        return [self.hidden, self.targets, *self.head.parameters(), *self.head.buffers()]


def measure_point(hidden: Tensor, targets: Tensor, vocabulary_size: int, slots: int, rounds: int) -> pd.DataFrame:
    """One row a scorer, pass and round, all of one interleaved run."""
    heads = {name: LoneHead(looks[0], hidden, targets, vocabulary_size, slots) for name, looks in SCORERS.items()}
    calls = {(name, FORWARD): head.forward for name, head in heads.items()}
    calls |= {(name, BOTH): head.forward_and_backward for name, head in heads.items()}
    named = {" | ".join(key): call for key, call in calls.items()}
    seconds = interleaved_seconds(named, rounds, 1, hidden.device, progress=False)
    rows: list[dict[str, Any]] = []
    for (name, direction), call in calls.items():
        head = heads[name]
        head.release()
        memory = peak_memory_of(call, hidden.device, head.live())
        row: dict[str, Any] = {"tokens": len(targets), "group_size": slots, "num_groups": head.num_groups}
        row |= {"groups_seen": head.groups_seen, "scorer": name, "pass": direction}
        row |= {"parameter_gib": sum(p.nbytes for p in head.head.parameters()) / BYTES_PER_GIB}
        row |= {"peak_memory_gib": memory.peak_bytes / BYTES_PER_GIB}
        values = seconds[f"{name} | {direction}"]
        rows += [row | {"round": index, "seconds": value} for index, value in enumerate(values)]
        head.release()
    return pd.DataFrame(rows)


def points_of(tokens: list[int], group_sizes: list[int]) -> list[tuple[int, int]]:
    """(N, S): every N at one S, every S at one N."""
    fixed_tokens, fixed_size = fixed_values(tokens, group_sizes)
    points = {(number, fixed_size) for number in tokens} | {(fixed_tokens, size) for size in group_sizes}
    return sorted(points)


def fixed_values(tokens: list[int], group_sizes: list[int]) -> tuple[int, int]:
    """(N while S varies, S while N varies): of those asked for, the nearest to 4,096 and to sqrt(V) = 225."""
    return min(tokens, key=lambda number: abs(number - 4096)), min(group_sizes, key=lambda size: abs(size - 225))


def timed(table: pd.DataFrame, **chosen: Any) -> dict[str, list[float]]:
    """Seconds of every round of each scorer in the rows where columns have the ``chosen`` values."""
    for column, value in chosen.items():
        table = table[table[column] == value]
    return {str(name): rows.sort_values("round")["seconds"].tolist() for name, rows in table.groupby("scorer")}


def markdown(table: pd.DataFrame) -> str:
    """Milliseconds and memory of a forward and backward pass at every size, the ratios, and where the loop wins."""
    lines = ["| N | S | groups seen | " + " | ".join(f"{name} (ms)" for name in SCORERS)]
    lines[0] += f" | {LOOP} / {SHARED} | forward alone | " + " | ".join(f"{name} (GiB)" for name in SCORERS) + " |"
    lines.append("|---" * (5 + 2 * len(SCORERS)) + "|")
    slower = []
    for (tokens, size), rows in table.groupby(POINT):
        seconds = timed(rows, **{"pass": BOTH})
        cells = []
        for name in SCORERS:
            low, middle, high = pd.Series(seconds[name]).quantile([0.25, 0.5, 0.75]) * 1e3
            cells.append(f"{middle:.3g} ({low:.3g} to {high:.3g})")
        ratio = ratio_summary(seconds, LOOP, SHARED).median
        alone = ratio_summary(timed(rows, **{"pass": FORWARD}), LOOP, SHARED).median
        slower.append((tokens, size, ratio))
        peaks = rows[rows["pass"] == BOTH].groupby("scorer")["peak_memory_gib"].first()
        memory = " | ".join(f"{peaks[name]:.3f}" for name in SCORERS)
        first = rows.iloc[0]
        lines.append(
            f"| {tokens:,} | {size:,} | {first['groups_seen']:,} of {first['num_groups']:,} | {' | '.join(cells)} "
            f"| {ratio:.2f} | {alone:.2f} | {memory} |"
        )
    most, least = (choose(slower, key=lambda point: point[2]) for choose in (max, min))
    faster = [f"N = {tokens:,}, S = {size:,}" for tokens, size, ratio in slower if ratio < 1]
    first = table.iloc[0]
    return "\n".join([
        *lines,
        "",
        f"* The published loop takes {least[2]:.2f} (N = {least[0]:,}, S = {least[1]:,}) to {most[2]:.2f} times "
        f"(N = {most[0]:,}, S = {most[1]:,}) as long as the published shared layer, forward and backward.",
        f"* It is the faster of the two at: {'; '.join(faster) if faster else 'none of these sizes'}.",
        "",
        f"Head alone, hidden {first['hidden_size']}, V = {first['vocabulary_size']:,}, fp32, groups by token id, "
        f"targets from {first['corpus']}; forward and backward but where it says otherwise. {table['round'].nunique()} "
        "interleaved rounds: medians with quartiles; ratios are medians of the rounds' own. Memory: peak of live "
        "tensors, parameters and gradients included. The layers of the groups have rows of their own, V x D "
        "numbers; the loop's are slices of one weight, whose gradient is put together at the end: V x D more for a "
        "moment than separate layers would take.",
        f"{first['hardware']}; torch {first['torch']}.",
        "",
    ])  # fmt: skip


def draw_sizes(table: pd.DataFrame, path: Path) -> None:
    """Time and memory over N and over S; bars from the first to the third quartile."""
    fixed_tokens, fixed_size = fixed_values(table["tokens"].unique().tolist(), table["group_size"].unique().tolist())
    sweeps = {
        "tokens": (table[table["group_size"] == fixed_size], f"Tokens N (S = {fixed_size:,})"),
        "group_size": (table[table["tokens"] == fixed_tokens], f"Group size S (N = {fixed_tokens:,})"),
    }
    figure, axes = plt.subplots(2, 2, figsize=(2 * COLUMN_INCHES, 4.2), sharex="col", sharey="row")
    for column, (over, (rows, label)) in enumerate(sweeps.items()):
        for direction, dash in PASSES.items():
            for name in SCORERS:
                draw_scorer(axes[:, column], rows[(rows["pass"] == direction) & (rows["scorer"] == name)], over, dash)
        axes[0, column].set(xscale="log", yscale="log")
        axes[1, column].set(xlabel=label, yscale="log")
        axes[1, column].xaxis.set_major_locator(FixedLocator(sorted(rows[over].unique())))
        axes[1, column].xaxis.set_major_formatter(ScalarFormatter())
        axes[1, column].xaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].set_ylabel("Head alone (ms)")
    axes[1, 0].set_ylabel("Peak memory (GiB)")
    for axis in axes.flat:
        axis.yaxis.set_minor_formatter(NullFormatter())
    lines = [
        plt.Line2D([], [], color=color, marker=marker, label=label) for _, label, color, marker in SCORERS.values()
    ]
    lines += [plt.Line2D([], [], color=GREY, linestyle=dash, label=name) for name, dash in PASSES.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=3)
    first = table.iloc[0]
    figure.suptitle(
        f"Hidden {first['hidden_size']}, V = {first['vocabulary_size']:,}, {first['corpus']}; medians and quartiles of "
        f"{table['round'].nunique()} interleaved rounds",
        fontsize=7,
    )
    save(figure, path)


def draw_scorer(axes: list[Axes], rows: pd.DataFrame, over: str, dash: str) -> None:
    """One scorer's time, with its quartiles, and memory."""
    _, _, color, marker = SCORERS[rows["scorer"].iloc[0]]
    low, middle, high = (1e3 * rows.groupby(over)["seconds"].quantile(share) for share in (0.25, 0.5, 0.75))
    spread = [middle - low, high - middle]
    axes[0].errorbar(middle.index, middle, spread, color=color, marker=marker, linestyle=dash, capsize=2)
    peak = rows.groupby(over)["peak_memory_gib"].first()
    axes[1].plot(peak.index, peak, color=color, marker=marker, linestyle=dash)


def measure_points(
    corpus: Corpus, tokens: list[int], group_sizes: list[int], hidden_size: int, rounds: int, device: torch.device
) -> pd.DataFrame:
    """All points. Raises UserError where the text has too few tokens."""
    targets = first_tokens(corpus, max(tokens)).to(device)
    torch.manual_seed(0)
    hidden = torch.randn(max(tokens), hidden_size, device=device)
    tables = [
        measure_point(hidden[:number], targets[:number], corpus.vocabulary_size, size, rounds)
        for number, size in tqdm(points_of(tokens, group_sizes), desc="sizes")
    ]
    setting: dict[str, Any] = {
        **corpus.described,
        "hidden_size": hidden_size,
        "vocabulary_size": corpus.vocabulary_size,
    }
    table = pd.concat(tables, ignore_index=True).assign(**setting, **origin())
    return table[[*setting, *table.columns.drop(list(setting))]]


def add_options(parser: ArgumentParser) -> None:
    """Rounds, sizes and the text."""
    add_rounds(parser, 7)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="numbers of tokens N")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=GROUP_SIZES, help="slots S of a group")
    parser.add_argument("--hidden-size", type=int, default=128, help="default %(default)s")
    add_settings(parser)


def measure(arguments: Namespace) -> None:
    """Time every scorer at every size and write the table."""
    at_least_one(arguments, "tokens", "group_sizes", "hidden_size")
    settings = composed(arguments.settings)
    path, measurement = COST / f"{NAME}.csv", identity(NAME, arguments, text_of(settings))
    if is_measured(path, measurement, timed=True):
        return
    sizes = (arguments.tokens, arguments.group_sizes, arguments.hidden_size, arguments.rounds)
    write_measured(
        measure_points(load_corpus(settings.data), *sizes, measuring_device()), path, measurement, beside="corpus"
    )


def draw(corpus: str) -> None:
    """Write a picture for each text that targets came from, the first under the table's own name, and the words."""
    path = RESULTS / corpus / f"{NAME}.csv"
    parts = list(read_measured(path, ("groups_seen",)).groupby("corpus"))
    for index, (text, rows) in enumerate(parts):
        draw_sizes(rows, path.with_name(f"{NAME}_{text}.png" if index else f"{NAME}.png"))
    words = "\n".join(markdown(rows) for _, rows in parts)
    write_text(path.with_suffix(".md"), words)
    print(words)
