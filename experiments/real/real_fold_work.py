"""Folding a finished model: what it costs in nats, against the tokens and steps that its groups' scores learn from.

    python -m experiments real_fold_work measure --smollm2 FILE.gguf --valid NAME=FILE ... --train FILE ...
    python -m experiments real_fold_work draw

One folding of ``real_fold``, whose texts, states and numbers these are: groups of 222 clustered by the model's rows
beside a shortlist of 2,048. ``measure`` writes results/cost/real_fold_work.csv, one row a text, form of the scores,
number of tokens, number of steps and number of visited groups.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from experiments.real.fold_inputs import MODEL, identity_of, rows_and_states
from experiments.real.fold_inputs import add_options as add_options
from experiments.real.real_fold import BASE, FORMS, group_scores, in_nats, measured_foldings, name_of, partition_of
from experiments.real.states import States
from experiments.study.figures import COLORS, COLUMN_INCHES, read_measured, save
from experiments.study.measuring import COST, is_measured, write_measured
from vocabfold.files import write_text
from vocabfold.heads import FullHead
from vocabfold.hugging_face.distil import BATCH_ROWS, STEPS
from vocabfold.machine import origin

NAME = "real_fold_work"
PATH = COST / f"{NAME}.csv"
CORPORA = ("cost",)
FEWEST_TOKENS, FACTOR = 5_000, 4  # from one number of tokens to the next; the last is all of them
LONGER = 4  # times as many steps, where the tokens are many enough to be told apart from more passes
LONGER_TOKENS = 50_000
SHOWN = {0: "-", 16: "--"}  # visited groups in the picture
LOOKS = {"linear": ("blue", "o"), "network": ("green", "^")}


def measure(arguments: Namespace) -> None:
    """Write results/cost/real_fold_work.csv."""
    measurement = identity_of(NAME, arguments)
    if is_measured(PATH, measurement):
        return
    rows = measured_rows(*rows_and_states(arguments))
    write_measured(pd.DataFrame(rows).assign(model=MODEL, **origin()), PATH, measurement)


def numbers_of_tokens(total: int) -> list[int]:
    """Each FACTOR times the one before, and all."""
    found = []
    number = FEWEST_TOKENS
    while number * FACTOR**0.5 < total:
        found.append(number)
        number *= FACTOR
    return [*found, total]


def measured_rows(weight: Tensor, train: States, valid: dict[str, States]) -> list[dict[str, Any]]:
    """Rows of every amount of work, with the model's output rows ``weight`` [V, D]."""
    vocabulary_size, hidden_size = weight.shape
    full = FullHead(hidden_size, vocabulary_size, torch.nn.Parameter(weight, requires_grad=False))
    partition = partition_of(BASE, weight, torch.bincount(train.targets, minlength=vocabulary_size))
    (taught,) = group_scores(weight, [partition], train.hidden)
    exact = {name: (states, group_scores(weight, [partition], states.hidden)[0]) for name, states in valid.items()}
    total = len(train.targets)
    work = [(form, number, STEPS) for form in LOOKS for number in numbers_of_tokens(total)]
    work += [("network", number, LONGER * STEPS) for number in numbers_of_tokens(total) if number >= LONGER_TOKENS]
    rows = []
    for form, number, steps in tqdm(work, desc="amounts of work"):
        folding = replace(BASE, form=form, share=number / total)
        for row in measured_foldings(full, [folding], partition, (train, taught), exact, steps):
            rows.append(row | {"steps": steps, "passes": steps * BATCH_ROWS / number})
    return rows


def draw(corpus: str) -> None:
    """Write results/CORPUS/real_fold_work.md and .png from its csv."""
    path = Path("results") / corpus / f"{NAME}.csv"
    table = read_measured(path, ("added_nats", "steps"))
    write_text(path.with_suffix(".md"), markdown(table))
    draw_curves(table, path.with_suffix(".png"))
    print(f"wrote {path.with_suffix('.md')}")


def draw_curves(table: pd.DataFrame, path: Path) -> None:
    """Added loss against tokens, a panel a text; open: longer learning."""
    texts = list(dict.fromkeys(table["text"]))
    figure, axes = plt.subplots(1, len(texts), figsize=(2 * COLUMN_INCHES, 2.6), squeeze=False, sharey=True)
    fewest = table["steps"].min()
    for axis, text in zip(axes[0], texts, strict=True):
        of_text = table[(table["text"] == text) & table["visited"].isin(SHOWN)]
        for _, rows in of_text.groupby(["form", "steps", "visited"]):
            form, steps, visited = (rows[column].iloc[0] for column in ("form", "steps", "visited"))
            color, marker = LOOKS[form]
            bars = [rows["added_nats"] - rows["added_low"], rows["added_high"] - rows["added_nats"]]
            label = f"{form}, {steps:,} steps{f', {visited} visited' if visited else ''}"
            axis.errorbar(
                rows["trained_tokens"],
                rows["added_nats"],
                np.clip(bars, 0, None),
                color=COLORS[color],
                marker=marker,
                linestyle=SHOWN[visited],
                markerfacecolor=COLORS[color] if steps == fewest else "white",
                capsize=1.5,
                elinewidth=0.7,
                label=label,
            )
        axis.set(xscale="log", xlabel="Tokens learned from (thousands)")
        tokens = sorted(table["trained_tokens"].unique())
        axis.set_xticks(tokens, [f"{number / 1e3:,.0f}" for number in tokens])
        axis.minorticks_off()
        axis.set_title(text, fontsize=8)
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].set_ylabel("Loss above the model's\n(nats a token)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    save(figure, path)


def markdown(table: pd.DataFrame) -> str:
    """A line for each amount of work, the visited groups side by side, and what four times the tokens are worth."""
    first = table.iloc[0]
    visits = sorted(table["visited"].unique())
    lines = [
        f"{first['model']}: {name_of(BASE).removesuffix(', ' + FORMS[BASE.form])}. Nats added to the loss of "
        "the next token (95% interval over documents), by what the groups' scores learned from.",
        "",
        "| text | scores | tokens | steps | passes | " + " | ".join(f"{visited} visited" for visited in visits) + " |",
        "|---" * (5 + len(visits)) + "|",
    ]
    for _, rows in table.groupby(["text", "form", "steps", "trained_tokens"], sort=False):
        first_row, of = rows.iloc[0], rows.set_index("visited")
        cells = " | ".join(in_nats(of.loc[visited]) for visited in visits)
        tokens, steps, passes = (first_row[column] for column in ("trained_tokens", "steps", "passes"))
        lines.append(
            f"| {first_row['text']} | {FORMS[first_row['form']]} | {tokens:,} | {steps:,} | {passes:.1f} | {cells} |"
        )
    plain = table[(table["visited"] == 0) & (table["form"] == "network") & (table["steps"] == table["steps"].min())]
    lines.append("")
    for text, rows in plain.groupby("text", sort=False):
        ordered = rows.sort_values("trained_tokens")
        gains = -np.diff(ordered["added_nats"])
        times = ordered["trained_tokens"].to_numpy()
        steps = [
            f"{gain:+.3f} from {before:,} to {after:,}"
            for gain, before, after in zip(gains, times[:-1], times[1:], strict=True)
        ]
        lines.append(f"* {text}: more tokens in as many steps gain a network without visits {', '.join(steps)}.")
    hardware = f"Measured on {first['hardware']}, torch {first['torch']}, commit {first['commit']}."
    return "\n".join([*lines, "", hardware, ""])
