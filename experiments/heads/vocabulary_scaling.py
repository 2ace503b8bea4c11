"""What a larger vocabulary costs each head, and what it brings: loss against V, or one text cut by two tokenizers.

    python -m vocabfold.train --multirun experiment=vocabulary_scaling
    python -m vocabfold.train --multirun experiment=larger_vocabulary data=text data.train=FILE data.valid=FILE
    python -m experiments vocabulary_scaling measure
    python -m experiments vocabulary_scaling draw [CORPUS ...]

results/CORPUS/vocabulary_scaling.csv -> .png and .md: on sequences with a Zipf law, whose entropy rate is known, the
loss above it. results/CORPUS/larger_vocabulary.csv -> .png and .md: between two tokenizers, whose tokens are of
different lengths, losses a token compare nothing; bits a byte of the validation text do.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, save, trained_on
from experiments.study.measuring import collect_runs
from experiments.study.statistics import mean_and_interval, summarise
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.runs.tables import RESULTS, read_table

HEADS = {
    "full_untied": ("full softmax, untied", COLORS["orange"], "D", "-"),
    "scale_shift_bpe": ("scale and shift, bpe", GREY, "x", ":"),
    "scale_shift_frequency": ("scale and shift, frequency", COLORS["blue"], "o", "--"),
    "scale_shift_clustered": ("scale and shift, clustered", COLORS["purple"], "s", "--"),
    "linear_clustered": ("folded: linear, clustered", COLORS["green"], "^", "-."),
}
SIZES, TEXT = TABLES = ("vocabulary_scaling", "larger_vocabulary")
OF_TEXT = {  # of one text cut by two tokenizers
    "validation_bits_per_byte": ("Bits a byte", "{:.3f}"),
    "validation_loss_nats": ("Loss (nats a token)", "{:.3f}"),
    "tokens_per_second": ("Training tokens/s", "{:,.0f}"),
    "peak_memory_gib": ("Peak training memory (GiB)", "{:.3f}"),
    "num_parameters": ("Parameters", "{:,.0f}"),
}


def measure(arguments: Namespace) -> None:
    """Gather the finished training runs into the tables. Raises UserError where neither experiment has any."""
    if not (found := [name for name in TABLES if any((RESULTS / "runs").glob(f"*/{name}/*/row.json"))]):
        raise UserError(f"no run of {' or '.join(TABLES)} has finished: train one of them first")
    for name in found:
        collect_runs(name, [])


def draw(corpus: str) -> None:
    """Write the picture and the words of each of the two tables that a corpus has."""
    for name, (draw_table, describe) in {SIZES: (draw_sizes, describe_sizes), TEXT: (draw_text, describe_text)}.items():
        path = RESULTS / corpus / f"{name}.md"
        if path.with_suffix(".csv").is_file():
            table = read_table(name, corpus)
            draw_table(table, path.with_suffix(".png"))
            write_text(path, describe(table))
            print(f"wrote {path}")


def quantity_of(table: pd.DataFrame) -> str:
    """The loss above the entropy rate where that is known, else the loss."""
    return "excess_loss_nats" if "excess_loss_nats" in table else "validation_loss_nats"


def caption(table: pd.DataFrame) -> str:
    """What was trained, how often."""
    return f"{trained_on(table)}; {table['seed'].nunique()} seeds, 95% intervals; {len(table)} runs"


def draw_sizes(table: pd.DataFrame, path: Path) -> None:
    """The loss against the size of the vocabulary."""
    quantity = quantity_of(table)
    figure, axis = plt.subplots(figsize=(COLUMN_INCHES, 2.4))
    draw_heads(axis, summarise(table, ["head", "vocabulary_size"], quantity))
    ticks = sorted(table["vocabulary_size"].unique())
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{size / 1e6:g}M" if size >= 1e6 else f"{size / 1000:.0f}k" for size in ticks])
    axis.minorticks_off()
    axis.set(xlabel="Vocabulary size V (tokens)", ylabel=f"{label_of(quantity)}\n(nats per token)")
    axis.legend()
    figure.suptitle(caption(table).replace(" M tokens; ", " M tokens\n"), fontsize=7)
    save(figure, path)


def draw_heads(axis: Axes, rows: pd.DataFrame, *, named_sizes: bool = False) -> None:
    """A line a head, with 95% intervals over seeds; sizes as they are, or each by its name at equal distances."""
    for head, (name, color, marker, dash) in HEADS.items():
        line = rows[rows["head"] == head].sort_values("vocabulary_size")
        if len(line):
            look: dict[str, Any] = {"color": color, "marker": marker, "linestyle": dash, "capsize": 2, "label": name}
            sizes = [f"{size:,}" for size in line["vocabulary_size"]] if named_sizes else line["vocabulary_size"]
            axis.errorbar(sizes, line["mean"], yerr=line["half_width"], **look)


def label_of(quantity: str) -> str:
    """In words."""
    return "Loss above the entropy rate" if quantity == "excess_loss_nats" else "Validation loss"


def describe_sizes(table: pd.DataFrame) -> str:
    """Mean and 95% interval over seeds, a line a head, a column a size of the vocabulary."""
    quantity = quantity_of(table)
    sizes = sorted(table["vocabulary_size"].unique())
    lines = ["| head | " + " | ".join(f"V = {size:,}" for size in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for head, (name, *_) in HEADS.items():
        of_head = table[table["head"] == head]
        if of_head.empty:
            continue
        cells = []
        for size in sizes:
            values = of_head.loc[of_head["vocabulary_size"] == size, quantity].tolist()
            mean, half_width = mean_and_interval(values) if values else (float("nan"), float("nan"))
            cells.append(f"{mean:.3f} ± {half_width:.3f}" if values else "not run")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{label_of(quantity)} in nats per token. {caption(table)}.", ""])


def draw_text(table: pd.DataFrame, path: Path) -> None:
    """Bits a byte and memory with each tokenizer."""
    figure, axes = plt.subplots(1, 2, figsize=(2 * COLUMN_INCHES, 2.3))
    for axis, quantity in zip(axes, ("validation_bits_per_byte", "peak_memory_gib"), strict=True):
        draw_heads(axis, summarise(table, ["head", "vocabulary_size"], quantity), named_sizes=True)
        axis.set(xlabel="Vocabulary size V (tokens)", ylabel=OF_TEXT[quantity][0])
        axis.margins(x=0.2)
    axes[1].set_yscale("log")
    axes[1].legend(loc="center")
    figure.suptitle(caption(table), fontsize=7)
    save(figure, path)


def describe_text(table: pd.DataFrame) -> str:
    """Means and 95% intervals over seeds, one line a head and tokenizer."""
    titles = [title for title, _ in OF_TEXT.values()]
    lines = ["| head | V | " + " | ".join(titles) + " | seeds |", "|---" * (len(titles) + 3) + "|"]
    for (head, size), rows in table.groupby(["head", "vocabulary_size"]):
        cells = []
        for quantity, (_, form) in OF_TEXT.items():
            mean, half_width = mean_and_interval(rows[quantity].tolist())
            varies = rows[quantity].nunique() > 1
            cells.append(form.format(mean) + (f" ± {form.format(half_width)}" if varies else ""))
        lines.append(f"| {HEADS[str(head)][0]} | {size:,} | " + " | ".join(cells) + f" | {len(rows)} |")
    notes = f"{caption(table)}. Learning rates were chosen with the tokenizer of 50,257. Speeds are of separate runs."
    return "\n".join([*lines, "", notes, f"{table['hardware'].iloc[0]}; torch {table['torch'].iloc[0]}.", ""])
