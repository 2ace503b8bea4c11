"""Trained runs read again: to use them, or to begin another run from them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vocabfold.data.batches import BatchPlan
from vocabfold.data.corpora import Corpus
from vocabfold.errors import UserError
from vocabfold.heads.base import Head
from vocabfold.models.build import ModelWithHead, build_model
from vocabfold.runs.checkpoint import load_weights, weights_metadata
from vocabfold.runs.settings import load_settings
from vocabfold.tokens import IGNORE_INDEX

AUTOCAST_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """What a run of that precision computes its model and head in; fp32: nothing changes."""
    return torch.autocast(device.type, AUTOCAST_TYPES[precision], enabled=precision != "fp32")


def load_run(folder: Path, device: torch.device) -> ModelWithHead:
    """The trained model of a finished run, ready to use. Raises UserError for a folder that is not one."""
    settings = load_settings(folder)
    vocabulary_size = weights_metadata(folder).get("vocabulary_size", "")
    if not vocabulary_size.isdecimal():
        raise UserError(f"{folder} holds weights without their vocabulary size: train it again with this version")
    model = build_model(settings.model, settings.head, int(vocabulary_size), embedding=settings.embedding)
    model.prepare_for_inference()
    load_weights(folder, model)
    return model.to(device).eval()


@torch.inference_mode()
def validation_values(
    folder: Path, corpus: Corpus, device: torch.device, values_of: Callable[[Head, Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """(``values_of(head, hidden [N, D], tokens [N])`` [targets, ...] float64, token [targets]) of every validation
    target of a finished run, in the order and at the positions of its own evaluation, in its precision; on the CPU.
    Raises UserError for a folder that is not a run."""
    settings = load_settings(folder)
    model = load_run(folder, device)
    plan = BatchPlan(settings.sequence_length, settings.evaluation_batch_size, seed=0)
    values, tokens = [], []
    for inputs, targets in corpus.batches("valid", plan).evaluation_batches():
        counted = targets.flatten() != IGNORE_INDEX
        tokens.append(targets.flatten()[counted])
        with autocast(device, settings.precision):
            hidden = model.backbone(inputs.to(device)).flatten(0, 1)[counted.to(device)]
            values.append(values_of(model.head, hidden, tokens[-1].to(device)).double().cpu())
    return torch.cat(values), torch.cat(tokens)


def validation_losses(folder: Path, corpus: Corpus, device: torch.device) -> tuple[Tensor, Tensor]:
    """(negative log likelihood in nats [targets] float64, token [targets]): see ``validation_values``."""
    return validation_values(folder, corpus, device, lambda head, hidden, tokens: -head.target_log_prob(hidden, tokens))
