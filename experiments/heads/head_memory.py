"""Peak memory of a training step with each head, simulated at two batch sizes: does a head fit beside its backbone?

    python -m experiments head_memory measure|draw

writes results/cost/head_memory.csv and .md at hidden 128, 8 layers, sequence 512, V = 50,257, fp32. Tokens are drawn
with probabilities 1 / rank. ``no_head`` is the same backbone with a head that costs nothing.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from experiments.heads.training_sides import FAST, FULL, FULL_SETTINGS, HEADS, NO_HEAD, Case, loss_of
from experiments.heads.training_step_words import MEMORY_OF_NO_HEAD, MEMORY_UNDER_FULL
from experiments.study.figures import read_measured
from experiments.study.measuring import COST, identity, is_measured, write_measured
from vocabfold.files import write_text
from vocabfold.machine import BYTES_PER_GIB, origin
from vocabfold.measure.simulate import TrainingParts, simulated_peak_memory
from vocabfold.models.build import ModelSettings, build_model
from vocabfold.runs.tables import RESULTS

VOCABULARY_SIZE = 50_257
BATCH_SIZES = (8, 32)
MODEL = ModelSettings()  # hidden 128, 8 layers, sequence 512


def training_parts(name: str, tokens: Tensor) -> TrainingParts:
    """The model with that head, and the optimizer that train.py takes."""
    case = Case(MODEL, VOCABULARY_SIZE, tokens[:, :-1], tokens[:, 1:], {})
    order = torch.randperm(VOCABULARY_SIZE) if "frequency" in name else None  # any order that is not the tokens' own
    model = build_model(MODEL, HEADS.get(name, FULL_SETTINGS), VOCABULARY_SIZE, order)
    return model, torch.optim.Adam(model.parameters(), fused=True), lambda: loss_of(model, case, name == NO_HEAD)


def describe(table: pd.DataFrame) -> str:
    """GiB of each head and size, over the bare backbone's, and the goals."""
    sizes = sorted(table["tokens"].unique())
    gib = table.pivot(index="head", columns="tokens", values="simulated_peak_memory_gib").reindex(
        table["head"].unique()
    )
    lines = [f"| head | {' | '.join(f'N = {size:,} (GiB) | {NO_HEAD} = 1' for size in sizes)} |"]
    lines += ["|---" * (1 + 2 * len(sizes)) + "|"]
    for name, row in gib.iterrows():
        cells = [f"{row[size]:.3f} | {row[size] / gib.loc[NO_HEAD, size]:.3f}" for size in sizes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| goal | reached | |", "|---|---|---|"]
    for name in [head for head in gib.index if FAST in head]:
        for size in sizes:
            reached = gib.loc[name, size] / gib.loc[NO_HEAD, size]
            verdict = "met" if reached <= MEMORY_OF_NO_HEAD else "**not met**"
            lines.append(f"| {name}: <= {MEMORY_OF_NO_HEAD} x {NO_HEAD} at N = {size:,} | {reached:.3f} | {verdict} |")
    for size in sizes:
        leanest = gib.loc[[head for head in gib.index if FAST in head], size].min()
        verdict = "met" if gib.loc[FULL, size] >= MEMORY_UNDER_FULL * leanest else "**not met**"
        text = (
            f"{gib.loc[FULL, size] / leanest:.1f} ({NO_HEAD} itself {gib.loc[FULL, size] / gib.loc[NO_HEAD, size]:.1f})"
        )
        lines.append(f"| {FULL} >= {MEMORY_UNDER_FULL} x the leanest at N = {size:,} | {text} | {verdict} |")
    return "\n".join(lines)


def measure(arguments: Namespace) -> None:
    """Simulate every head and write the table."""
    path, measurement = COST / "head_memory.csv", identity("head_memory", arguments)
    if is_measured(path, measurement):
        return
    weights = 1.0 / torch.arange(1, VOCABULARY_SIZE + 1)
    generator = torch.Generator().manual_seed(0)
    length = MODEL.max_positions + 1
    tokens = torch.multinomial(weights, max(BATCH_SIZES) * length, replacement=True, generator=generator)
    rows = []
    for batch_size in BATCH_SIZES:
        batch = tokens[: batch_size * length].view(batch_size, length)
        for name in tqdm((FULL, *HEADS, NO_HEAD), desc=f"batch {batch_size}"):
            peak = simulated_peak_memory(partial(training_parts, name, batch)).peak_bytes
            row = {"head": name, "tokens": batch_size * MODEL.max_positions}
            rows.append(row | {"simulated_peak_memory_gib": peak / BYTES_PER_GIB})
    table = pd.DataFrame(rows).assign(
        hidden_size=MODEL.hidden_size,
        num_layers=MODEL.num_layers,
        **origin(),
    )
    write_measured(table, path, measurement)


def draw(corpus: str) -> None:
    """Write the table in words."""
    path = RESULTS / corpus / "head_memory.csv"
    words = describe(read_measured(path, ("head", "simulated_peak_memory_gib"))) + "\n"
    write_text(path.with_suffix(".md"), words)
    print(words + f"wrote {path.with_suffix('.md')}")
