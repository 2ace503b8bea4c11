"""Figure 3's memory at the paper's own size, simulated: batch 32 x 512, hidden 64, 4 layers, 2 heads, fp32, Adam.

    python -m experiments figure3_simulated_memory measure

writes results/cost/figure3_simulated_memory.csv, one row a group size and one for the full softmax; seconds on any
machine, since no floating-point tensor is real. figure3_group_size draws it beside the published curve.
"""

from __future__ import annotations

from argparse import Namespace

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments.study.measuring import COST, identity, is_measured, write_measured
from vocabfold.heads import HeadSettings
from vocabfold.heads.settings import PartitionSettings
from vocabfold.machine import BYTES_PER_GIB, origin
from vocabfold.measure.simulate import SimulatedMemory, TrainingParts, simulated_peak_memory
from vocabfold.models.build import ModelSettings, build_model

VOCABULARY_SIZE = 50_257
BATCH_SIZE, SEQUENCE_LENGTH = 32, 512
MODEL = ModelSettings(hidden_size=64, num_layers=4, num_heads=2, max_positions=SEQUENCE_LENGTH)
GROUP_SIZES = (14, 20, 28, 40, 56, 80, 113, 160, 225, 320, 450, 640, 900, 1288, 1794, 2392, 3000, 3864)


def simulate(head: HeadSettings) -> SimulatedMemory:
    """One training step at the paper's size with ``head``."""

    def build() -> TrainingParts:
        model = build_model(MODEL, head, VOCABULARY_SIZE)
        tokens = torch.randint(VOCABULARY_SIZE, (BATCH_SIZE, SEQUENCE_LENGTH + 1))

        def compute_loss() -> Tensor:
            loss: Tensor = model(tokens[:, :-1], tokens[:, 1:]).loss
            return loss

        return nn.Module.train(model), torch.optim.Adam(model.parameters(), fused=True), compute_loss

    return simulated_peak_memory(build)


def row_of(head: HeadSettings) -> dict[str, object]:
    """The line of one head in the table."""
    memory = simulate(head)
    parts = {name.removesuffix("_bytes") + "_gib": value / BYTES_PER_GIB for name, value in vars(memory).items()}
    return {"head": head.name, "group_size": head.partition.group_size, **parts}


def measure(arguments: Namespace) -> None:
    """Simulate every group size and write the table."""
    path, measurement = COST / "figure3_simulated_memory.csv", identity("figure3_simulated_memory", arguments)
    if is_measured(path, measurement):
        return
    heads = [HeadSettings("full", "full", tied=True)]
    heads += [
        HeadSettings("paper", "folded", tied=False, partition=PartitionSettings(group_size=S)) for S in GROUP_SIZES
    ]
    table = pd.DataFrame([row_of(head) for head in tqdm(heads, desc="simulated training steps")])
    table["group_size"] = table["group_size"].astype("Int64")
    table = table.assign(
        batch_size=BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        **origin(),
    )
    write_measured(table, path, measurement)
