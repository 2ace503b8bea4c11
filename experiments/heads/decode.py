"""Tokens per second of decoding with a key/value cache, from trained runs, in one interleaved run.

    python -m vocabfold.train --multirun experiment=decode        # the runs, a few minutes on two cores
    python -m experiments decode measure [--run FOLDER ...] [KEY=VALUE ...]
    python -m experiments decode draw [CORPUS ...]

writes results/CORPUS/decode.csv, one row a method, way of choosing tokens, batch size and round, and from it decode.md
and decode.png. Any runs can be named, one of them with a full softmax. ``full, sorted`` cuts to top-p as it is often
written, by a sort; ``full`` draws first and asks then, which is faster. ``no_head`` is the same backbone with a head
that costs nothing: no head can be faster.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.artist import Artist
from torch import Tensor

from experiments.study.decoding import Chooser, decode
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, report, save
from experiments.study.measuring import (
    add_rounds,
    add_settings,
    at_least_one,
    corpus_of,
    identity,
    is_measured,
    measuring_device,
    run_folders,
    write_measured,
)
from vocabfold.data.corpora import load_corpus
from vocabfold.errors import UserError
from vocabfold.heads import FullHead, Head
from vocabfold.heads.sampling import draw_from_sorted
from vocabfold.machine import origin
from vocabfold.measure.speed import interleaved_seconds, ratio_summary
from vocabfold.measure.visits import visits_of
from vocabfold.models.build import ModelWithHead
from vocabfold.runs.load import load_run
from vocabfold.runs.record import finished_row
from vocabfold.runs.settings import load_settings
from vocabfold.runs.tables import IDENTITY_COLUMNS, RESULTS

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-k 50": {"top_k": 50},
    "top-p 0.95": {"top_p": 0.95},
    "temperature 1": {},
}
TOP_P = "top-p 0.95"
FULL, SORTED, NO_HEAD = "full", "full, sorted", "no_head"
GOAL = 3.0  # times the tokens a second of the full softmax, with top-p
RUN_COLUMNS = [*IDENTITY_COLUMNS, "validation_loss_nats"]


@dataclass
class Run:
    """A trained model and its row; ``name`` is what the tables call it."""

    name: str
    row: dict[str, Any]
    model: ModelWithHead


def load_runs(folders: list[Path], device: torch.device) -> list[Run]:
    """The finished runs. Raises UserError unless one has a full softmax, and where two bear one name."""
    runs: dict[str, Run] = {}
    for folder in folders:
        row = finished_row(folder)
        if row is None:
            raise UserError(f"{folder} holds no finished run: train it to its end, or name another folder")
        model = load_run(folder, device)
        model.head.prepare_to_decode()
        # One full softmax is compared with, whatever its preset is called.
        run = Run(FULL if isinstance(model.head, FullHead) else str(row["head"]), row, model)
        if run.name in runs:
            raise UserError(f"two of the runs are both {run.name}: name the folders to compare on the command line")
        runs[run.name] = run
    if FULL not in runs:
        raise UserError("none of the runs has the full softmax, which the others are compared with: name one")
    return sorted(runs.values(), key=lambda run: run.name != FULL)


def prompts_of(folder: Path, batch_size: int, length: int) -> Tensor:
    """Tokens [B, T] of the run's validation text, from beginnings evenly spread over it."""
    tokens = load_corpus(load_settings(folder).data).valid.tokens
    if len(tokens) < length:
        raise UserError(f"the validation text has {len(tokens)} tokens: choose a --prompt-tokens up to that")
    starts = [index * (len(tokens) - length) // batch_size for index in range(batch_size)]
    return torch.tensor([tokens[start : start + length].tolist() for start in starts])


def choosers(run: Run, settings: dict[str, Any]) -> dict[str, Chooser]:
    """The ways to choose tokens that are timed for a run: its head's own, and the sort of a full softmax."""
    head = run.model.head

    def sort(hidden: Tensor, generator: torch.Generator) -> Tensor:
        log_prob, tokens = head.log_prob(hidden).sort(dim=-1, descending=True)
        return tokens.gather(-1, draw_from_sorted(log_prob, 1.0, settings["top_p"], generator).unsqueeze(-1))[:, 0]

    ways = {run.name: lambda hidden, generator: head.sample(hidden, generator=generator, **settings)}
    return ways | ({SORTED: sort} if run.name == FULL and "top_p" in settings else {})


@torch.inference_mode()
def mean_entropy_nats(model: ModelWithHead, prompts: Tensor) -> float:
    """Of the next token, over the last 8 positions of each prompt."""
    hidden = model.gpt(prompts)[:, -8:].flatten(0, 1)
    total = 0.0
    for part in hidden.split(16):
        log_prob = model.head.log_prob(part)
        total -= float((log_prob.exp() * log_prob).sum())
    return total / len(hidden)


def groups_visited(head: Head, work: Callable[[], Tensor]) -> float | None:
    """How many groups a token of ``work`` needs; None for a head without groups."""
    if (visits := visits_of(head)) is None:
        return None
    with visits:
        tokens = work().numel()
    return visits.num_groups / tokens


def measure_decoding(runs: list[Run], prompts: dict[int, Tensor], new_tokens: int, rounds: int) -> pd.DataFrame:
    """One row a method, strategy, batch size and round; ``prompts`` [B, T] by batch size B."""
    device = next(iter(prompts.values())).device
    methods: dict[tuple[int, str, str], Callable[[], Tensor]] = {}
    described: dict[tuple[int, str, str], dict[str, Any]] = {}
    entropies = {run.name: mean_entropy_nats(run.model, prompts[max(prompts)]) for run in runs}
    for batch_size, prompt in prompts.items():
        for strategy, settings in STRATEGIES.items():
            for run in runs:
                known = {name: run.row.get(name) for name in RUN_COLUMNS}
                known |= {"entropy_nats": entropies[run.name]}
                for method, choose in choosers(run, settings).items():
                    key = (batch_size, strategy, method)
                    methods[key] = lambda parts=(run.model, prompt, new_tokens, choose): decode(*parts)  # type: ignore[misc]
                    described[key] = known | {"groups_visited": groups_visited(run.model.head, methods[key])}
        tokens = prompt[:, 0]
        bare = (runs[0].model, prompt, new_tokens, lambda hidden, generator, tokens=tokens: tokens)
        methods[batch_size, "", NO_HEAD] = lambda bare=bare: decode(*bare)  # type: ignore[misc]
        described[batch_size, "", NO_HEAD] = {}
    names = {" | ".join(map(str, key)): key for key in methods}
    seconds = interleaved_seconds({name: methods[key] for name, key in names.items()}, rounds, 1, device, progress=True)
    rows = []
    for name, key in names.items():
        batch_size, strategy, method = key
        shape = {"batch_size": batch_size, "prompt_tokens": prompts[batch_size].shape[1], "new_tokens": new_tokens}
        for round_index, value in enumerate(seconds[name]):
            measured = {"method": method, "strategy": strategy, **shape, "round": round_index, "seconds": value}
            rows.append({**dict.fromkeys(RUN_COLUMNS), **described[key], **measured})
    return pd.DataFrame(rows)


def summarise_methods(table: pd.DataFrame) -> pd.DataFrame:
    """One row a batch size, strategy and method: median and 2.5 to 97.5% range of the rounds."""
    rows = []
    for batch_size, of_batch in table.groupby("batch_size"):
        bare = of_batch[of_batch["method"] == NO_HEAD]["seconds"].tolist()
        for strategy in STRATEGIES:
            chosen = of_batch[of_batch["strategy"] == strategy]
            seconds = {str(method): rows["seconds"].tolist() for method, rows in chosen.groupby("method", sort=False)}
            for method, values in (seconds | {NO_HEAD: bare}).items():
                first = (chosen if method != NO_HEAD else of_batch)[
                    lambda rows, method=method: rows["method"] == method
                ].iloc[0]
                tokens = first["batch_size"] * first["new_tokens"]
                speed = pd.Series(tokens / pd.Series(values)).quantile([0.025, 0.5, 0.975]).tolist()
                times = seconds | {NO_HEAD: bare}
                ratios = {to: ratio_summary(times, to, method) for to in (FULL, SORTED) if to in times}
                share = 1 - ratio_summary(times, NO_HEAD, method).median
                groups = {"groups_visited": first["groups_visited"], "num_groups": first["num_groups"]}
                row = {"batch_size": batch_size, "strategy": strategy, "method": method, "speed": speed, "share": share}
                rows.append(row | {"ratios": ratios, **groups})
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """The table of medians, the goal, and what was measured how."""
    lines = [
        "| batch | tokens by | head | tokens/s | speed, full = 1 | speed, full, sorted = 1 | head's share of the time "
        "| groups visited a token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    goals = []
    for _, row in summarise_methods(table).iterrows():
        ratios = {
            to: f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" for to, ratio in row["ratios"].items()
        }
        visited = "" if pd.isna(row["groups_visited"]) else f"{row['groups_visited']:.1f} of {row['num_groups']:,.0f}"
        lines.append(
            f"| {row['batch_size']} | {row['strategy']} | {row['method']} | {row['speed'][1]:,.0f} | {ratios[FULL]} "
            f"| {ratios.get(SORTED, '')} | {max(0.0, row['share']):.0%} | {visited} |"
        )
        if row["strategy"] == TOP_P and row["method"] not in (FULL, SORTED, NO_HEAD):
            reached = "reached" if row["ratios"][SORTED].median >= GOAL else "not reached"
            goals.append(
                f"* {row['method']}, batch {row['batch_size']}: {row['ratios'][SORTED].median:.2f}x the full softmax "
                f"with its sort (goal {GOAL:.0f}x: {reached}), {row['ratios'][FULL].median:.2f}x without"
            )
    first = table[table["method"] == FULL].iloc[0]
    entropies = table.drop_duplicates("method").dropna(subset="entropy_nats")
    told = ", ".join(f"{row['method']} {row['entropy_nats']:.2f}" for _, row in entropies.iterrows())
    losses = ", ".join(f"{row['method']} {row['validation_loss_nats']:.2f}" for _, row in entropies.iterrows())
    notes = [
        f"Hidden {first['hidden_size']:.0f}, {first['num_layers']:.0f} layers, corpus {first['corpus']}; prompt "
        f"{first['prompt_tokens']} tokens, {first['new_tokens']} new ones, fp32, key/value cache; the prompt's own "
        f"pass is in the time. {table['round'].nunique()} interleaved rounds: medians, ratios with their 2.5 to 97.5% "
        "range. The head's share is what the same backbone without a head would save.",
        f"Mean entropy of the next token (nats): {told}. Validation loss (nats): {losses}.",
        f"{first['hardware']}; torch {first['torch']}.",
    ]
    return "\n".join([*lines, "", f"With {TOP_P}:", "", *goals, "", *notes, ""])


def draw_speeds(table: pd.DataFrame, path: Path) -> None:
    """Bars of tokens per second, a panel for each batch size, with the range of the rounds."""
    summary = summarise_methods(table)
    methods = [method for method in dict.fromkeys(summary["method"]) if method != NO_HEAD]
    methods.sort(key=lambda method: method not in (FULL, SORTED))
    colors = dict(zip(methods, [COLORS[name] for name in ("orange", "red", "blue", "green", "purple")], strict=False))
    batches = sorted(summary["batch_size"].unique())
    figure, axes = plt.subplots(1, len(batches), figsize=(2 * COLUMN_INCHES, 2.4), squeeze=False)
    height = 0.8 / len(methods)
    for axis, batch_size in zip(axes[0], batches, strict=True):
        rows = summary[summary["batch_size"] == batch_size]
        for _, row in rows[rows["method"] != NO_HEAD].iterrows():
            place = list(STRATEGIES).index(row["strategy"]) + (methods.index(row["method"]) + 0.5) * height - 0.4
            low, middle, high = row["speed"]
            axis.barh(
                place,
                middle,
                height,
                xerr=[[middle - low], [high - middle]],
                color=colors.get(row["method"], GREY),
                error_kw={"elinewidth": 0.7},
            )
        bare = rows[rows["method"] == NO_HEAD].iloc[0]["speed"][1]
        axis.axvline(bare, color=GREY, linestyle="--", linewidth=0.8)
        axis.set_yticks(range(len(STRATEGIES)), STRATEGIES)
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set_axisbelow(True)
        axis.set_xlabel("Decoded tokens per second")
        axis.set_title(f"batch {batch_size}", fontsize=8)
    handles: list[Artist] = [plt.Rectangle((0, 0), 1, 1, color=colors.get(method, GREY)) for method in methods]
    handles.append(plt.Line2D([], [], color=GREY, linestyle="--", linewidth=0.8))
    first = table[table["method"] == FULL].iloc[0]
    size = f"hidden {first['hidden_size']:.0f}, {first['num_layers']:.0f} layers"
    figure.suptitle(f"{first['corpus']}; {size}; {table['round'].nunique()} interleaved rounds", fontsize=7)
    figure.legend(handles, [*methods, "the backbone alone"], loc="outside lower center", ncols=3)
    save(figure, path)


def add_options(parser: ArgumentParser) -> None:
    """Rounds, runs and sizes."""
    add_rounds(parser, 5)
    parser.add_argument("--run", type=Path, nargs="+", help="folders of runs (default: those of experiment=decode)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="default %(default)s")
    parser.add_argument("--new-tokens", type=int, default=64, help="default %(default)s")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16], help="default %(default)s")
    add_settings(parser)


def measure(arguments: Namespace) -> None:
    """Time the runs and write the table."""
    at_least_one(arguments, "prompt_tokens", "new_tokens", "batch_sizes")
    corpus = corpus_of(arguments.settings)
    path = RESULTS / corpus / "decode.csv"
    folders = arguments.run or run_folders("decode", corpus)
    measurement = identity("decode", arguments, [folder.name for folder in folders])
    if is_measured(path, measurement, "measurement", timed=True):
        return
    device = measuring_device()
    runs = load_runs(folders, device)
    prompts = {size: prompts_of(folders[0], size, arguments.prompt_tokens) for size in arguments.batch_sizes}
    prompts = {size: prompt.to(device) for size, prompt in prompts.items()}
    table = measure_decoding(runs, prompts, arguments.new_tokens, arguments.rounds).assign(**origin())
    write_measured(table, path, measurement, "measurement")


def draw(corpus: str) -> None:
    """Write the picture and the table in words."""
    report(RESULTS / corpus / "decode.csv", markdown, draw_speeds, ("method", "groups_visited"))
