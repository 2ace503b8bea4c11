"""The optimizer of a run and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from vocabfold.runs.settings import OptimizerSettings


def build_optimizer(settings: OptimizerSettings, model: nn.Module) -> torch.optim.Optimizer:
    """Adam, or AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (settings.betas[0], settings.betas[1])
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    on_cuda = matrices[0].device.type == "cuda"
    # Fused: one pass over memory and no temporaries; on a CPU several times as fast as the default. Capturable: its
    # step may be part of a CUDA graph.
    return kind(groups, lr=settings.learning_rate, betas=betas, fused=True, capturable=on_cuda)


def learning_rate_at(settings: OptimizerSettings, step: int, used: float) -> float:
    """The learning rate of step ``step`` (from 0) when the share ``used`` (0 to 1) of the training budget is gone.

    It rises linearly over ``warmup_steps``; a cosine falls from the first step on to ``final_fraction`` at the end.
    """
    rate = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup_steps))
    if settings.schedule == "constant":
        return rate
    cosine = 0.5 * (1 + math.cos(math.pi * min(used, 1.0)))
    return rate * (settings.final_fraction + (1 - settings.final_fraction) * cosine)
