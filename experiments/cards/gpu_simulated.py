"""The memory of the training steps of gpu_steps.py on tensors without data: what the measured ones are compared with.

Needs no card. Only the lean models: the paper's own code is in results/cost/table2_memory.csv.
"""

from __future__ import annotations

from functools import partial

import torch

from experiments.cards.bench import Plan
from experiments.cards.gpu_steps import BF16, EAGER, FP32, LEAN, Sizes, StepSide, groups_and_sizes
from experiments.cards.rows import OK, Rows
from vocabfold.machine import BYTES_PER_GIB
from vocabfold.measure.simulate import TrainingParts, simulated_peak_memory

KEYS = ("vocabulary_size", "hidden_size", "batch_size", "sequence_length", "precision", "side")
OWN = ("parameters_gib", "gradients_gib", "optimizer_state_gib", "activations_gib")


def parts_of(side: str, sizes: Sizes, precision: str) -> TrainingParts:
    """A step, for simulated_peak_memory."""
    one = StepSide(side, sizes, precision, torch.device("cpu"))
    return one.module, one.optimizer, one.loss


def measure_part(rows: Rows, plan: Plan) -> None:
    """Every lean side at every size."""
    groups, sizes_of = groups_and_sizes(plan.tiny)
    hidden_sizes = sorted({hidden_size for hidden_size, _, mode, _ in groups if mode == EAGER})
    for hidden_size in hidden_sizes:
        for precision in (FP32, BF16):
            for side in LEAN:
                sizes = sizes_of(hidden_size)
                key = {"vocabulary_size": sizes.vocabulary_size, "hidden_size": hidden_size}
                key |= {"batch_size": sizes.batch_size, "sequence_length": sizes.sequence_length}
                words = {"precision": precision, "side": side}
                if plan.seconds_left <= 0:
                    return
                if rows.stands(key | words):
                    continue
                sizes.text(torch.device("cpu"))  # drawn here and kept: a draw without data would be none
                memory = simulated_peak_memory(partial(parts_of, side, sizes, precision))
                gib = {
                    "parameters_gib": memory.parameter_bytes,
                    "gradients_gib": memory.gradient_bytes,
                    "optimizer_state_gib": memory.optimizer_state_bytes,
                    "activations_gib": memory.activation_bytes,
                    "peak_memory_gib": memory.peak_bytes,
                }
                row = {name: value / BYTES_PER_GIB for name, value in gib.items()}
                rows.add([{**key, **words, **row, "round": 0, "rounds": 1, "status": OK}])
                plan.say(f"{hidden_size}, {precision}, {side}: {row['peak_memory_gib']:.2f} GiB")
