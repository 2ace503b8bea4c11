"""The goal for memory at V = 50,257: at N = 4,096 and 16,384 a fast head stays within 5% of the backbone's own peak."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from vocabfold.heads import HeadSettings
from vocabfold.heads.settings import PartitionSettings
from vocabfold.measure.simulate import TrainingParts, simulated_peak_memory
from vocabfold.models.build import ModelSettings, build_model

VOCABULARY_SIZE, SEQUENCE_LENGTH = 50_257, 512
FAST = {
    "scale_shift_sorted": HeadSettings(type="folded", tied=False, scorer="scale_shift_sorted"),
    "low_rank_sorted": HeadSettings(type="folded", tied=False, scorer="low_rank_sorted"),
    "linear_sorted": HeadSettings(type="folded", tied=True, scorer="linear_sorted"),
    "shortlist": HeadSettings(
        type="folded", tied=True, scorer="linear_sorted", partition=PartitionSettings("random", shortlist=2048)
    ),
}


def training_parts(settings: HeadSettings | None, tokens: Tensor) -> TrainingParts:
    """A model of 8 layers with hidden size 128, and the head, or nothing, on top."""
    backbone = ModelSettings(hidden_size=128, num_layers=8, max_positions=SEQUENCE_LENGTH)
    order = torch.randperm(VOCABULARY_SIZE)
    model = build_model(backbone, settings or HeadSettings(), VOCABULARY_SIZE, order)

    def compute_loss() -> Tensor:
        if settings is None:
            return model.backbone(tokens[:, :-1]).mean()
        loss: Tensor = model(tokens[:, :-1], tokens[:, 1:]).loss
        return loss

    module: nn.Module = model
    return module, torch.optim.Adam(module.parameters(), fused=True), compute_loss


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [8, 32])
def test_a_fast_head_adds_at_most_a_twentieth(batch_size: int) -> None:
    weights = 1 / torch.arange(1, VOCABULARY_SIZE + 1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(weights, batch_size * (SEQUENCE_LENGTH + 1), replacement=True, generator=generator)
    tokens = tokens.view(batch_size, SEQUENCE_LENGTH + 1)
    free = simulated_peak_memory(lambda: training_parts(None, tokens)).peak_bytes
    for settings in FAST.values():
        peak = simulated_peak_memory(partial(training_parts, settings, tokens)).peak_bytes
        assert peak <= 1.05 * free
