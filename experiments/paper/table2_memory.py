"""Table 2 of arXiv 2411.06371: peak training memory of GPT-2, GPT-Neo and the paper's head, and on which card it fits.

    python -m experiments table2_memory measure [--on-cuda]
    python -m experiments table2_memory draw

simulates one training step (fp32, Adam) at the paper's sizes on any machine: of this project's lean backbone and of the
paper's own setting (experiments/paper/paper_code.py; `pip install 'vocabfold[hf]'`); then for batches of 1 to 64 and
sequences of 128 to 2,048. It writes results/cost/table2_memory.csv, .md and .png; --on-cuda adds, on a machine with
CUDA, the same steps measured on it.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter
from tqdm import tqdm

from experiments.paper.paper_tables import MODELS, SETTINGS, Case
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, report, save
from experiments.study.measuring import COST, identity, is_measured, write_measured
from vocabfold.errors import UserError
from vocabfold.machine import BYTES_PER_GIB, origin
from vocabfold.measure.memory import live_tensors, peak_memory_of
from vocabfold.measure.simulate import simulated_peak_memory
from vocabfold.runs.tables import RESULTS

HIDDEN_SIZES = (128, 256, 1024, 2048)
BATCH_SIZES = (1, 4, 16, 32, 64)
SEQUENCE_LENGTHS = (128, 256, 512, 1024, 2048)
VARIED_HIDDEN_SIZE = 128
# What the driver leaves to programs of the nominal 16, 24 and 48 GB, as nvidia-smi reports it.
USABLE_MIB = {"T4": 15_360, "A10G": 23_028, "L40S": 46_068}
DRAWN = {
    ("paper_code", "gpt2"): (COLORS["orange"], "s"),
    ("paper_code", "gpt_neo"): (COLORS["red"], "^"),
    ("paper_code", "grouped"): (COLORS["purple"], "D"),
    ("lean", "gpt2"): (COLORS["green"], "v"),
    ("lean", "grouped"): (COLORS["blue"], "o"),
}


def cases() -> Iterator[Case]:
    """Every cell of the table, then of the picture; the library's GPT-Neo has no fused attention."""
    for setting in SETTINGS:
        for model in MODELS:
            if (setting, model) != ("paper_code_unfused", "gpt_neo"):
                yield from (Case(setting, model, hidden_size) for hidden_size in HIDDEN_SIZES)
    for setting, model in DRAWN:
        case = Case(setting, model, VARIED_HIDDEN_SIZE)
        yield from (replace(case, batch_size=size) for size in BATCH_SIZES if size != 32)
        yield from (replace(case, sequence_length=length) for length in SEQUENCE_LENGTHS if length != 512)


def simulate(case: Case) -> dict[str, object]:
    """The row of one case: GiB at the peak by purpose."""
    memory = simulated_peak_memory(case.build)
    parts = {
        "parameters": memory.parameter_bytes,
        "buffers": memory.buffer_bytes,
        "gradients": memory.gradient_bytes,
        "optimizer_state": memory.optimizer_state_bytes,
        "activations": memory.kept_activation_bytes,
        "temporaries": memory.activation_bytes - memory.kept_activation_bytes,
        "peak_memory": memory.peak_bytes,
    }
    return asdict(case) | {f"{name}_gib": value / BYTES_PER_GIB for name, value in parts.items()}


def measure_on_cuda(case: Case) -> float:
    """GiB that the allocator has reserved at the peak of a step, as published; NaN where the card is too small."""
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    try:
        module, optimizer, loss = case.build(device)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss().backward()
            optimizer.step()

        step()
        memory = peak_memory_of(step, device, live_tensors(module, optimizer))
    except torch.cuda.OutOfMemoryError:
        return float("nan")
    assert memory.reserved_bytes is not None
    return memory.reserved_bytes / BYTES_PER_GIB


def table_of(on_cuda: bool) -> pd.DataFrame:
    """Simulate all cases, and measure them too if asked."""
    rows = []
    for case in tqdm(list(cases()), desc="simulated training steps", mininterval=2.0):
        row = simulate(case)
        rows.append(row | ({"measured_reserved_gib": measure_on_cuda(case)} if on_cuda else {}))
    table = pd.DataFrame(rows)
    return table.assign(**origin())


def fits(peak_gib: float, card: str) -> bool:
    """Whether a peak fits into what a card leaves to programs."""
    return peak_gib * 1024 <= USABLE_MIB[card]


def markdown(table: pd.DataFrame) -> str:
    """For every card and size: the published cell, then ours in each setting."""
    published = pd.read_csv(RESULTS / "paper" / "table2_memory.csv")
    rows = at_published_batch(table)
    peak = peaks(table)
    lines = ["| card, hidden size | model | published (GB) | " + " | ".join(SETTINGS.values()) + " (GiB) |"]
    lines.append("|---" * (3 + len(SETTINGS)) + "|")
    for _, cell in published.iterrows():
        for model, name in MODELS.items():
            ours = []
            for setting in SETTINGS:
                value = peak.get((setting, model, cell["hidden_size"]))
                fit = value is not None and fits(value, cell["gpu"])
                ours.append("-" if value is None else f"{value:.2f}" if fit else f"oom ({value:.1f})")
            lines.append(
                f"| {cell['gpu']} {cell['capacity_gb']} GB, {cell['hidden_size']} | {name} | {cell[f'{model}_gb']} | "
                + " | ".join(ours) + " |"
            )  # fmt: skip
    lines += ["", *purposes(rows), "", *agreement(published, peak), ""]
    usable = ", ".join(f"{card} {mib:,} MiB" for card, mib in USABLE_MIB.items())
    lines.append(
        f"Simulated: batch 32 x 512, 8 layers, 8 heads, fp32, Adam; oom: more than a card leaves to programs "
        f"({usable}).\n"
        "The published figures are what a caching allocator reserved; these are the bytes of live tensors."
    )
    return "\n".join([*lines, ""])


def purposes(rows: pd.DataFrame) -> list[str]:
    """What the memory at the peak is, at the smallest published size."""
    names = ["parameters", "gradients", "optimizer_state", "activations", "temporaries", "peak_memory"]
    lines = [f"At hidden {HIDDEN_SIZES[0]}, in GiB:", "", "| setting, model | " + " | ".join(names) + " |"]
    lines.append("|---" * (1 + len(names)) + "|")
    for _, row in rows[rows["hidden_size"] == HIDDEN_SIZES[0]].iterrows():
        cells = " | ".join(f"{row[f'{name}_gib']:.2f}" for name in names)
        lines.append(f"| {SETTINGS[row['setting']]}, {MODELS[row['model']]} | {cells} |")
    return lines


def agreement(published: pd.DataFrame, peak: pd.Series) -> list[str]:
    """How many cells are `oom` where the published ones are, and GPT-Neo's memory over the grouped model's."""
    lines = []
    for setting, title in SETTINGS.items():
        agree, total = agreeing_cells(published, peak, setting)
        ratios = [f"{saving(peak, setting, size):.1f}" for size in HIDDEN_SIZES]
        lines.append(
            f"* {title}: {agree} of {total} cells fit or fail as published; GPT-Neo over grouped at hidden "
            f"{', '.join(map(str, HIDDEN_SIZES))}: {', '.join(ratios)} (published 3.4, 3.5, 1.8, not known)."
        )
    return lines


def agreeing_cells(published: pd.DataFrame, peak: pd.Series, setting: str) -> tuple[int, int]:
    """(cells that fit or fail as published, cells that were simulated)."""
    agree = total = 0
    for _, cell in published.iterrows():
        for model in MODELS:
            value = peak.get((setting, model, cell["hidden_size"]))
            if value is not None:
                total += 1
                agree += fits(value, cell["gpu"]) == (cell[f"{model}_gb"] != "oom")
    return agree, total


def saving(peak: pd.Series, setting: str, hidden_size: int) -> float:
    """GPT-Neo's memory over the grouped model's; GPT-Neo has no setting with unfused attention of its own."""
    neo = "lean" if setting == "lean" else "paper_code"
    return float(peak[neo, "gpt_neo", hidden_size] / peak[setting, "grouped", hidden_size])


def at_published_batch(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a batch of 32 x 512."""
    return table[(table["batch_size"] == 32) & (table["sequence_length"] == 512)]


def peaks(table: pd.DataFrame) -> pd.Series:
    """GiB at the published batch, by setting, model and hidden size."""
    return at_published_batch(table).set_index(["setting", "model", "hidden_size"])["peak_memory_gib"]


def draw_sizes(table: pd.DataFrame, path: Path) -> None:
    """Memory over batch and sequence."""
    figure, axes = plt.subplots(1, 2, figsize=(2 * COLUMN_INCHES, 2.8), sharey=True)
    panels = [
        ("batch_size", "sequence_length", 512, BATCH_SIZES),
        ("sequence_length", "batch_size", 32, SEQUENCE_LENGTHS),
    ]
    for axis, (varied, fixed, value, ticks) in zip(axes, panels, strict=True):
        rows = table[(table["hidden_size"] == VARIED_HIDDEN_SIZE) & (table[fixed] == value)].sort_values(varied)
        for (setting, model), (color, marker) in DRAWN.items():
            curve = rows[(rows["setting"] == setting) & (rows["model"] == model)]
            label = f"{MODELS[model]}, {SETTINGS[setting]}"
            axis.plot(curve[varied], curve["peak_memory_gib"], color=color, marker=marker, label=label)
        for card, mib in USABLE_MIB.items():
            axis.axhline(mib / 1024, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
            axis.text(ticks[0], mib / 1024, card, fontsize=7, color=GREY, va="bottom")
        axis.set(xscale="log", yscale="log", xlabel=varied.replace("_", " ").capitalize())
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_locator(FixedLocator([0.1, 0.3, 1, 3, 10, 30, 100]))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(f"hidden {VARIED_HIDDEN_SIZE}, {fixed.replace('_', ' ')} {value}", fontsize=7)
    axes[0].set_ylabel("Peak training memory (GiB)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    save(figure, path)


def add_options(parser: ArgumentParser) -> None:
    """Whether to measure too."""
    parser.add_argument("--on-cuda", action="store_true", help="measure every case on this machine's GPU too")


def measure(arguments: Namespace) -> None:
    """Simulate every case and write the table."""
    if arguments.on_cuda and not torch.cuda.is_available():
        raise UserError("--on-cuda, but there is no CUDA here: leave it out to simulate only")
    path, measurement = COST / "table2_memory.csv", identity("table2_memory", arguments)
    if not is_measured(path, measurement, timed=arguments.on_cuda):
        write_measured(table_of(arguments.on_cuda), path, measurement)


def draw(corpus: str) -> None:
    """Write the picture and the table in words."""
    report(RESULTS / corpus / "table2_memory.csv", markdown, draw_sizes, ("peak_memory_gib",))
