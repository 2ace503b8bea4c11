"""What each part of the training recipe is worth: the memory of squares, decay, warm-up, count biases, tied rows.

    python -m vocabfold.train --multirun experiment=recipe data=text data.train=FILE data.valid=FILE
    python -m experiments recipe measure [KEY=VALUE ...]
    python -m experiments recipe draw [CORPUS ...]

results/CORPUS/recipe.csv -> recipe.png and recipe.md. A part is judged by pairs of runs of one seed that differ in it
alone: where all else is the recipe of heads_scaling, and over all pairs that were trained. Whatever runs are there are
compared.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments.study.collecting import budget_columns, collect_with_settings
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, save
from experiments.study.measuring import add_settings
from experiments.study.statistics import Difference, paired_difference
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.runs.settings import Settings
from vocabfold.runs.tables import RESULTS, read_table

NAME = "recipe"
SHORT, MIDDLE = 0.95, 0.99  # beta2, where it is not 0.999
# Each part, and the words for having it.
PARTS = {
    "warm_up": "warm-up over 5% of the steps",
    "short_memory": "beta2 of 0.95 instead of 0.999",
    "middle_memory": "beta2 of 0.99 instead of 0.999",
    "decay": "weight decay of 0.1 (AdamW)",
    "counts": "biases from counts",
    "tied": "tied rows instead of free ones",
}
# The parts that heads_scaling has, but for tied rows: that table holds both.
WHOLE = {
    "warm_up": True,
    "short_memory": False,
    "middle_memory": False,
    "decay": True,
    "counts": True,
    "tied": False,
}
# Heads that differ only in parts of the recipe are one family: {head: (family, counts, tied)}.
FAMILIES = {
    "full": ("full softmax", False, True),
    "full_untied": ("full softmax", False, False),
    "full_counts": ("full softmax", True, True),
    "full_untied_counts": ("full softmax", True, False),
    "linear_clustered": ("one linear layer a group, clustered", False, False),
    "linear_clustered_counts": ("one linear layer a group, clustered", True, False),
    "conditioned_clustered": ("conditioned on the group, clustered", True, False),
    "conditioned_exchanged": ("conditioned on the group, groups by exchange", True, False),
}
KEY = ["family", "training_tokens", "epochs", "learning_rate", "hidden_size"]
ENDS = ("all else as in heads_scaling", "all pairs")
END_LOOKS = {ENDS[0]: (COLORS["blue"], "o"), ENDS[1]: (GREY, "D")}

add_options = add_settings


def measure(arguments: Namespace) -> None:
    """Gather the finished training runs into the table, with the columns that say which parts each had."""
    collect_with_settings(NAME, arguments.settings, recipe_columns)


def recipe_columns(settings: Settings) -> dict[str, Any]:
    """The budget of a run, and the parts of the recipe that its optimizer and head had."""
    optimizer, head = settings.optimizer, settings.head
    return budget_columns(settings) | {
        "warmup_steps": optimizer.warmup_steps,
        "beta2": optimizer.betas[1],
        "weight_decay": optimizer.weight_decay,
        "count_biases": head.count_biases,
    }


def draw(corpus: str) -> None:
    """Write one corpus' picture and table in words."""
    runs = runs_of(corpus)
    effects = effects_of(runs)
    groups, parts = list(dict.fromkeys(effect.group for effect in effects)), varied(effects)
    figure, axes = plt.subplots(
        1, max(1, len(groups)), figsize=(2 * COLUMN_INCHES, 2.6), sharey=True, sharex=True, squeeze=False
    )
    for axis, group in zip(axes[0], groups, strict=False):
        for place, part in enumerate(parts):
            for number, end in enumerate(ENDS):
                found = [one for one in effects if (one.group, one.part, one.end) == (group, part, end)]
                for effect in found:
                    color, marker = END_LOOKS[end]
                    width = np.nan_to_num(effect.difference.half_width)
                    axis.errorbar(
                        effect.difference.mean, place + 0.2 * (number - 0.5), xerr=width, color=color, marker=marker,
                        capsize=2, linestyle="",
                    )  # fmt: skip
        axis.axvline(0, color=GREY, linewidth=0.8)
        axis.set_title(group.replace(", ", "\n", 1), fontsize=7)
        axis.set(xlabel="Change of the loss (nats)", ylim=(len(parts) - 0.5, -0.5))
    axes[0, 0].set_yticks(range(len(parts)), [PARTS[part] for part in parts])
    for end, (color, marker) in END_LOOKS.items():
        axes[0, 0].plot([], [], color=color, marker=marker, linestyle="", label=end)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ENDS))
    figure.suptitle(f"{caption(runs)}; below 0: the part helps", fontsize=7)
    save(figure, RESULTS / corpus / f"{NAME}.png")
    path = RESULTS / corpus / f"{NAME}.md"
    write_text(path, markdown(runs, effects))
    print(f"wrote {path}")


def runs_of(corpus: str) -> pd.DataFrame:
    """The runs of recipe, with a boolean column a part. Raises UserError where runs differ in something else."""
    table = read_table(NAME, corpus)
    table = table[table["head"].isin(FAMILIES)]
    of_head = table["head"].map(FAMILIES)
    # A conditioned head without count biases has no name of its own, and any head can be tied by a setting.
    runs = table.assign(
        family=[family for family, _, _ in of_head],
        warm_up=table["warmup_steps"] > 0,
        short_memory=np.isclose(table["beta2"], SHORT),
        middle_memory=np.isclose(table["beta2"], MIDDLE),
        decay=table["weight_decay"] > 0,
        counts=table["count_biases"].astype(bool),
        tied=table["tied"].astype(bool),
    )
    if (repeated := runs[runs.duplicated([*KEY, *PARTS, "seed"])]).any(axis=None):
        first = repeated.iloc[0]
        raise UserError(
            f"results/{corpus}/{NAME}.csv has several runs of {first['head']} with the same parts and seed, such as "
            f"{first['run']}: keep runs of other settings in another experiment"
        )
    return runs


@dataclass(frozen=True)
class Effect:
    """What having a part changes: the loss with it minus the loss without, over pairs of runs."""

    group: str  # family and budget
    part: str
    end: str
    difference: Difference


def effects_of(runs: pd.DataFrame) -> list[Effect]:
    """Each part's effect at both ends and over all pairs, where there are pairs. A pair is two runs of one seed that
    differ in that part alone."""
    effects = []
    for key, rows in runs.groupby(KEY, sort=False):
        group = name_of(key, runs)
        for part in PARTS:
            pairs = pairs_of(rows, part)
            for end, base in zip(ENDS, (WHOLE, None), strict=True):
                chosen = pairs if base is None else at_end(pairs, part, base)
                if len(chosen):
                    difference = paired_difference(chosen["with"].tolist(), chosen["without"].tolist())
                    effects.append(Effect(group, part, end, difference))
    return effects


def varied(effects: Sequence[Effect]) -> list[str]:
    """The parts that some pair differs in."""
    found = {effect.part for effect in effects}
    return [part for part in PARTS if part in found]


def number(value: object) -> float:
    """A number that pandas groups by."""
    return float(str(value))


def name_of(key: Sequence[object], runs: pd.DataFrame) -> str:
    """A family and budget in words, with rate and hidden size where the runs have several."""
    tokens, epochs, rate, size = map(number, key[1 : len(KEY)])
    words = f"{key[0]}, {tokens * epochs / 1e6:g} M tokens"
    words += f", rate {rate:g}" if runs["learning_rate"].nunique() > 1 else ""
    return words + (f", hidden {size:g}" if runs["hidden_size"].nunique() > 1 else "")


def pairs_of(rows: pd.DataFrame, part: str) -> pd.DataFrame:
    """Columns of the other parts, seed, with and without: the losses of runs that differ in ``part`` alone."""
    same = [name for name in PARTS if name != part] + ["seed"]
    sides = {
        flag: rows[rows[part].astype(bool) == flag].set_index(same)["validation_loss_nats"] for flag in (True, False)
    }
    return pd.DataFrame({"with": sides[True], "without": sides[False]}).dropna().reset_index()


def at_end(pairs: pd.DataFrame, part: str, base: Mapping[str, bool]) -> pd.DataFrame:
    """The pairs whose other parts are those of ``base``. A beta2 is either short or middle."""
    for name, value in base.items():
        if name != part:
            pairs = pairs[pairs[name].astype(bool) == value]
    return pairs


def caption(runs: pd.DataFrame) -> str:
    """What was trained, how often."""
    first, seeds = runs.iloc[0], runs["seed"].nunique()
    return (
        f"{first['corpus']}; hidden {first['hidden_size']:.0f}, {first['num_layers']:.0f} layers; "
        f"{seeds} seed{'s' if seeds > 1 else ''}; {len(runs)} runs"
    )


def markdown(runs: pd.DataFrame, effects: list[Effect]) -> str:
    """A table for each family and budget: each part's effect; then every combination's mean loss."""
    lines = []
    for group in dict.fromkeys(effect.group for effect in effects):
        lines += [f"## {group}", "", "| part | " + " | ".join(ENDS) + " |", "|---" * (len(ENDS) + 1) + "|"]
        for part in varied(effects):
            cells = []
            for end in ENDS:
                found = [one.difference for one in effects if (one.group, one.part, one.end) == (group, part, end)]
                cells.append(cell_of(found[0]) if found else "not run")
            lines.append(f"| {PARTS[part]} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["## Every combination", "", "| what | " + " | ".join(PARTS) + " | loss (nats) | seeds |"]
    lines.append("|---" * (len(PARTS) + 3) + "|")
    for key, rows in runs.groupby([*KEY, *PARTS], sort=True):
        marks = " | ".join("yes" if flag else "" for flag in key[len(KEY) :])
        loss, what = rows["validation_loss_nats"].mean(), name_of(key, runs)
        lines.append(f"| {what} | {marks} | {loss:.3f} | {rows['seed'].nunique()} |")
    lines += [
        "",
        f"{caption(runs)}. Change of the loss in nats by having a part, below 0 where it helps; pairs of "
        "one seed, 95% intervals by Student's t where there are two pairs or more, the number of pairs in brackets. "
        "One learning rate for all combinations: a part that allows another rate may be worth more than it shows here.",
        "",
    ]
    return "\n".join(lines)


def cell_of(found: Difference) -> str:
    """An effect with its interval and the number of pairs."""
    width = "" if math.isnan(found.half_width) else f" ± {found.half_width:.3f}"
    return f"{found.mean:+.3f}{width} ({found.count})"
