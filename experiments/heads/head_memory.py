"""Peak memory of a training step with each head, simulated at two batch sizes: does a head fit beside its backbone?

    python -m experiments head_memory

writes results/simulated/head_memory.csv and .md at hidden 128, 8 layers, sequence 512, V = 50,257, fp32. Tokens are
drawn with probabilities 1 / rank. ``free`` is the same backbone with a head that costs nothing.
"""

from __future__ import annotations

from functools import partial

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from experiments.heads.step_report import FAST, FREE, FULL, MEMORY_OF_FREE, MEMORY_UNDER_FULL
from experiments.heads.training_step import FULL_SETTINGS, HEADS, Case, loss_of
from vocabfold.command_line import ArgumentParser, one_line_errors
from vocabfold.files import write_text
from vocabfold.machine import BYTES_PER_GIB, origin
from vocabfold.measure.simulate import TrainingParts, simulated_peak_memory
from vocabfold.models.build import ModelSettings, build_model
from vocabfold.runs.record import RESULTS

VOCABULARY_SIZE = 50_257
BATCH_SIZES = (8, 32)
MODEL = ModelSettings()  # hidden 128, 8 layers, sequence 512


def training_parts(name: str, tokens: Tensor) -> TrainingParts:
    """The model with that head, and the optimizer that train.py takes."""
    case = Case(MODEL, VOCABULARY_SIZE, tokens[:, :-1], tokens[:, 1:], {})
    order = torch.randperm(VOCABULARY_SIZE) if "frequency" in name else None  # any order that is not the tokens' own
    model = build_model(MODEL, HEADS.get(name, FULL_SETTINGS), VOCABULARY_SIZE, order)
    return model, torch.optim.Adam(model.parameters(), fused=True), lambda: loss_of(model, case, name == FREE)


def describe(table: pd.DataFrame) -> str:
    """GiB of each head and size, over the free head's, and the goals."""
    sizes = sorted(table["tokens"].unique())
    gib = table.pivot(index="head", columns="tokens", values="simulated_peak_memory_gib").reindex(
        table["head"].unique()
    )
    lines = [f"| head | {' | '.join(f'N = {size:,} (GiB) | {FREE} = 1' for size in sizes)} |"]
    lines += ["|---" * (1 + 2 * len(sizes)) + "|"]
    for name, row in gib.iterrows():
        cells = [f"{row[size]:.3f} | {row[size] / gib.loc[FREE, size]:.3f}" for size in sizes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| goal | reached | |", "|---|---|---|"]
    for name in [head for head in gib.index if FAST in head]:
        for size in sizes:
            reached = gib.loc[name, size] / gib.loc[FREE, size]
            verdict = "met" if reached <= MEMORY_OF_FREE else "**not met**"
            lines.append(f"| {name}: <= {MEMORY_OF_FREE} x {FREE} at N = {size:,} | {reached:.3f} | {verdict} |")
    for size in sizes:
        leanest = gib.loc[[head for head in gib.index if FAST in head], size].min()
        verdict = "met" if gib.loc[FULL, size] >= MEMORY_UNDER_FULL * leanest else "**not met**"
        text = f"{gib.loc[FULL, size] / leanest:.1f} ({FREE} itself {gib.loc[FULL, size] / gib.loc[FREE, size]:.1f})"
        lines.append(f"| {FULL} >= {MEMORY_UNDER_FULL} x the leanest at N = {size:,} | {text} | {verdict} |")
    return "\n".join(lines)


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    ArgumentParser(description=__doc__).parse_args()
    weights = 1.0 / torch.arange(1, VOCABULARY_SIZE + 1)
    generator = torch.Generator().manual_seed(0)
    length = MODEL.max_positions + 1
    tokens = torch.multinomial(weights, max(BATCH_SIZES) * length, replacement=True, generator=generator)
    rows = []
    for batch_size in BATCH_SIZES:
        batch = tokens[: batch_size * length].view(batch_size, length)
        for name in tqdm((FULL, *HEADS, FREE), desc=f"batch {batch_size}"):
            peak = simulated_peak_memory(partial(training_parts, name, batch)).peak_bytes
            row = {"head": name, "tokens": batch_size * MODEL.max_positions}
            rows.append(row | {"simulated_peak_memory_gib": peak / BYTES_PER_GIB})
    table = pd.DataFrame(rows).assign(
        hidden_size=MODEL.hidden_size,
        num_layers=MODEL.num_layers,
        **origin("head_memory"),
    )
    path = RESULTS / "simulated" / "head_memory.csv"
    write_text(path, table.to_csv(index=False))
    words = describe(table) + "\n"
    write_text(path.with_suffix(".md"), words)
    print(words + f"wrote {path}")


if __name__ == "__main__":
    main()
