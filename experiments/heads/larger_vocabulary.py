"""One text cut by two tokenizers: what the larger vocabulary costs each head, and what it brings.

results/SCALE/larger_vocabulary.csv -> results/SCALE/larger_vocabulary.png and .md. Between tokenizers, whose tokens are
of different lengths, losses a token compare nothing: bits a byte of the validation text do.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from experiments.heads.vocabulary_scaling import CONTENDERS, caption
from experiments.study.figures import COLUMN_INCHES, draw_for_scales, save
from experiments.study.statistics import mean_and_interval, summarise
from vocabfold.files import write_text
from vocabfold.runs.record import RESULTS, read_table

QUANTITIES = {
    "validation_bits_per_byte": ("Bits a byte", "{:.3f}"),
    "validation_loss_nats": ("Loss (nats a token)", "{:.3f}"),
    "tokens_per_second": ("Training tokens/s", "{:,.0f}"),
    "peak_memory_gib": ("Peak training memory (GiB)", "{:.3f}"),
    "num_parameters": ("Parameters", "{:,.0f}"),
}


def draw(scale: str) -> None:
    """Write one scale's picture and table."""
    table = read_table("larger_vocabulary", scale)
    figure, axes = plt.subplots(1, 2, figsize=(2 * COLUMN_INCHES, 2.3))
    for axis, quantity in zip(axes, ("validation_bits_per_byte", "peak_memory_gib"), strict=True):
        rows = summarise(table, ["contender", "vocabulary_size"], quantity)
        for contender, (name, color, marker, dash) in CONTENDERS.items():
            line = rows[rows["contender"] == contender].sort_values("vocabulary_size")
            if len(line):
                look = {"color": color, "marker": marker, "linestyle": dash}
                sizes = [f"{size:,}" for size in line["vocabulary_size"]]
                axis.errorbar(sizes, line["mean"], yerr=line["half_width"], label=name, capsize=2, **look)
        axis.set(xlabel="Vocabulary size V (tokens)", ylabel=QUANTITIES[quantity][0])
        axis.margins(x=0.2)
    axes[1].set_yscale("log")
    axes[1].legend(loc="center")
    figure.suptitle(caption(table), fontsize=7)
    save(figure, RESULTS / scale / "larger_vocabulary.png")
    path = RESULTS / scale / "larger_vocabulary.md"
    write_text(path, markdown(table))
    print(f"wrote {path}")


def markdown(table: pd.DataFrame) -> str:
    """Means and 95% intervals over seeds, one line a head and tokenizer."""
    titles = [title for title, _ in QUANTITIES.values()]
    lines = ["| head | V | " + " | ".join(titles) + " | seeds |", "|---" * (len(titles) + 3) + "|"]
    for (contender, size), rows in table.groupby(["contender", "vocabulary_size"]):
        cells = []
        for quantity, (_, form) in QUANTITIES.items():
            mean, half_width = mean_and_interval(rows[quantity].tolist())
            varies = rows[quantity].nunique() > 1
            cells.append(form.format(mean) + (f" ± {form.format(half_width)}" if varies else ""))
        lines.append(f"| {CONTENDERS[str(contender)][0]} | {size:,} | " + " | ".join(cells) + f" | {len(rows)} |")
    notes = f"{caption(table)}. Learning rates were chosen with the tokenizer of 50,257. Speeds are of separate runs."
    return "\n".join([*lines, "", notes, f"{table['hardware'].iloc[0]}; torch {table['torch'].iloc[0]}.", ""])


if __name__ == "__main__":
    draw_for_scales("larger_vocabulary", draw)()
