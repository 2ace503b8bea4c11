"""What a run is made of, without a run: the optimizer's groups, its learning rate, means over unequal batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vocabfold.heads import HeadLoss
from vocabfold.runs.distributed import MeanLosses, Ranks
from vocabfold.runs.optimizer import build_optimizer, learning_rate_at
from vocabfold.runs.settings import OptimizerSettings

SETTINGS = OptimizerSettings(
    name="adamw",
    learning_rate=2.0,
    betas=[0.8, 0.99],
    weight_decay=0.25,
    schedule="cosine",
    warmup_steps=4,
    final_fraction=0.1,
)


def test_weight_decay_is_for_matrices_only() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    optimizer = build_optimizer(SETTINGS, model)
    decay = {id(one): group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}
    assert [decay[id(parameter)] for parameter in model.parameters()] == [0.25, 0.0, 0.0, 0.25, 0.0]
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (0.8, 0.99)


def test_the_learning_rate_rises_step_by_step_and_falls_by_a_cosine() -> None:
    rates = [learning_rate_at(SETTINGS, step, 0.0) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    for used in (0.0, 0.25, 0.5, 1.0, 1.5):
        cosine = 0.5 * (1 + math.cos(math.pi * min(used, 1.0)))
        assert learning_rate_at(SETTINGS, 9, used) == pytest.approx(2.0 * (0.1 + 0.9 * cosine))


def test_each_target_weighs_the_same_in_a_mean_over_batches() -> None:
    means = MeanLosses()
    for loss, accuracy, count in ((4.0, 1.0, 1), (1.0, 0.0, 3), (9.0, 1.0, 0)):
        parts = {"accuracy": torch.tensor(accuracy)}
        means.add(HeadLoss(torch.tensor(loss, requires_grad=True), torch.tensor(count), parts))
    assert means.means(Ranks(), "train_") == pytest.approx({"train_loss": 7 / 4, "train_accuracy": 1 / 4})
