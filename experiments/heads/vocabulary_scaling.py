"""How the loss goes with the size of the vocabulary: nats above the entropy rate of sequences with a Zipf law.

results/SCALE/vocabulary_scaling.csv -> results/SCALE/vocabulary_scaling.png and .md. On real text, where the entropy
is not known, the loss itself is shown.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, draw_for_scales, save
from experiments.study.statistics import mean_and_interval, summarise
from vocabfold.files import write_text
from vocabfold.runs.record import RESULTS, read_table

CONTENDERS = {
    "full_free": ("full softmax, free rows", COLORS["orange"], "D", "-"),
    "scale_shift_bpe": ("scale and shift, bpe", GREY, "x", ":"),
    "scale_shift_frequency": ("scale and shift, frequency", COLORS["blue"], "o", "--"),
    "scale_shift_clustered": ("scale and shift, clustered", COLORS["purple"], "s", "--"),
    "linear_clustered": ("linear, clustered", COLORS["green"], "^", "-."),
}


def draw(scale: str) -> None:
    """Write one scale's picture and table."""
    table = read_table("vocabulary_scaling", scale)
    quantity = quantity_of(table)
    label = "Loss above the entropy rate" if quantity == "excess_loss_nats" else "Validation loss"
    figure, axis = plt.subplots(figsize=(COLUMN_INCHES, 2.4))
    rows = summarise(table, ["contender", "vocabulary_size"], quantity)
    for contender, (name, color, marker, dash) in CONTENDERS.items():
        line = rows[rows["contender"] == contender].sort_values("vocabulary_size")
        if len(line):
            sizes, error = line["vocabulary_size"], line["half_width"]
            axis.errorbar(
                sizes, line["mean"], yerr=error, label=name, color=color, marker=marker, linestyle=dash, capsize=2
            )
    ticks = sorted(table["vocabulary_size"].unique())
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{size / 1e6:g}M" if size >= 1e6 else f"{size / 1000:.0f}k" for size in ticks])
    axis.minorticks_off()
    axis.set(xlabel="Vocabulary size V (tokens)", ylabel=f"{label}\n(nats per token)")
    axis.legend()
    figure.suptitle(caption(table), fontsize=7)
    save(figure, RESULTS / scale / "vocabulary_scaling.png")
    path = RESULTS / scale / "vocabulary_scaling.md"
    write_text(path, markdown(table, quantity, label))
    print(f"wrote {path}")


def quantity_of(table: pd.DataFrame) -> str:
    """The loss above the entropy rate where that is known, else the loss."""
    return "excess_loss_nats" if "excess_loss_nats" in table else "validation_loss_nats"


def caption(table: pd.DataFrame) -> str:
    """What was trained, how often."""
    first = table.iloc[0]
    return (
        f"{first['corpus']}, {first['tokens'] / 1e6:.2f} M tokens, hidden {first['hidden_size']}; "
        f"{table['seed'].nunique()} seeds, 95% intervals; {len(table)} runs"
    )


def markdown(table: pd.DataFrame, quantity: str, label: str) -> str:
    """Mean and 95% interval over seeds, a line a head, a column a size of the vocabulary."""
    sizes = sorted(table["vocabulary_size"].unique())
    lines = ["| head | " + " | ".join(f"V = {size:,}" for size in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for contender, (name, *_) in CONTENDERS.items():
        of_head = table[table["contender"] == contender]
        if of_head.empty:
            continue
        cells = []
        for size in sizes:
            values = of_head.loc[of_head["vocabulary_size"] == size, quantity].tolist()
            mean, half_width = mean_and_interval(values) if values else (float("nan"), float("nan"))
            cells.append(f"{mean:.3f} ± {half_width:.3f}" if values else "not run")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{label} in nats per token. {caption(table)}.", ""])


if __name__ == "__main__":
    draw_for_scales("vocabulary_scaling", draw)()
