"""GPT-2 and GPT-Neo with the full softmax against the paper's grouped head: loss, speed and memory.

results/SCALE/main_comparison.csv -> results/SCALE/main_comparison.png and .md
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from vocabfold.figures import COLORS, COLUMN_INCHES, draw_for_scales, save, summarise
from vocabfold.files import write_text
from vocabfold.records import RESULTS, read_table
from vocabfold.seeds import difference_over_seeds

MODELS = {"gpt2": "GPT-2", "gpt_neo": "GPT-Neo"}
HEADS = {"full": (COLORS["orange"], "s"), "grouped": (COLORS["blue"], "o")}
QUANTITIES = {
    "validation_loss_nats": ("Validation loss (nats per token)", "{:.3f}"),
    "perplexity": ("Perplexity", "{:.2f}"),
    "tokens_per_second": ("Training tokens per second", "{:,.0f}"),
    "peak_memory_gib": ("Peak training memory (GiB)", "{:.3f}"),
    "flops_per_token": ("FLOPs per training token", "{:,.0f}"),
    "num_parameters": ("Parameters", "{:,.0f}"),
}
DRAWN = ("validation_loss_nats", "tokens_per_second", "peak_memory_gib")
KEY = ["hidden_size", "model", "head"]


def draw(scale: str) -> None:
    """Write one scale's picture and table."""
    table = read_table("main_comparison", scale)
    figure, axes = plt.subplots(1, len(DRAWN), figsize=(2 * COLUMN_INCHES, 2.1), sharey=True)
    for axis, quantity in zip(axes, DRAWN, strict=True):
        rows = summarise(table, KEY, quantity).sort_values(KEY, ascending=[False, False, True], ignore_index=True)
        for position, row in rows.iterrows():
            color, marker = HEADS[row["head"]]
            axis.errorbar(row["mean"], position, xerr=row["half_width"], color=color, marker=marker, capsize=3)
        axis.set_yticks(range(len(rows)), [name_of(row, table) for _, row in rows.iterrows()])
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.set_xlabel(QUANTITIES[quantity][0])
        if quantity != "validation_loss_nats":
            axis.set_xlim(left=0)
    first = table.iloc[0]
    figure.suptitle(
        f"{first['corpus']}, {first['tokens'] / 1e6:.2f} M tokens; {table['seed'].nunique()} seeds, 95% intervals; "
        f"{len(table)} runs",
        fontsize=7,
    )
    save(figure, RESULTS / scale / "main_comparison.png")
    path = RESULTS / scale / "main_comparison.md"
    write_text(path, markdown(table))
    print(f"wrote {path}")


def name_of(row: pd.Series, table: pd.DataFrame) -> str:
    """The label of one arm; the hidden size is named only where it varies."""
    size = f", {row['hidden_size']}" if table["hidden_size"].nunique() > 1 else ""
    return f"{MODELS[row['model']]}{size}, {row['head']}"


def markdown(table: pd.DataFrame) -> str:
    """Means and 95% intervals over seeds, one line an arm."""
    arms = summarise(table, KEY, "validation_loss_nats")
    titles = [title for title, _ in QUANTITIES.values()]
    lines = ["| model, head | " + " | ".join(titles) + " | seeds |", "|---" * (len(titles) + 2) + "|"]
    for _, arm in arms.iterrows():
        rows = table[(table[KEY] == arm[KEY].to_numpy()).all(axis=1)]
        cells = []
        for quantity, (_, form) in QUANTITIES.items():
            summary = summarise(rows, KEY, quantity).iloc[0]
            varies = rows[quantity].nunique() > 1
            cells.append(form.format(summary["mean"]) + (f" ± {form.format(summary['half_width'])}" if varies else ""))
        lines.append(f"| {name_of(arm, table)} | " + " | ".join(cells) + f" | {arm['seeds']} |")
    first = table.iloc[0]
    notes = f"Corpus {first['corpus']}, {first['tokens']:,} tokens; mean ± 95% interval (Student's t) over seeds."
    hardware = f"Hardware: {first['hardware']}; torch {first['torch']}."
    return "\n".join([*lines, "", *differences(table), "", notes, hardware, ""])


def differences(table: pd.DataFrame) -> list[str]:
    """Grouped minus full in validation loss, for each model: the mean over seeds, its 95% interval, a paired t-test."""
    lines = []
    for _, rows in table.groupby(["hidden_size", "model"]):
        found = difference_over_seeds(rows, "head", "grouped", "full")
        if found.count < 2:
            continue
        name = name_of(rows.iloc[0], table).removesuffix(f", {rows.iloc[0]['head']}")
        lines.append(
            f"* {name}: grouped minus full {found.mean:+.3f} ± {found.half_width:.3f} nats (paired t-test over "
            f"{found.count} seeds, p = {found.p_value:.2g})"
        )
    return lines


if __name__ == "__main__":
    draw_for_scales("main_comparison", draw)()
