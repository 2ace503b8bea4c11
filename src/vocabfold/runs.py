"""Trained runs read again: to use them, or to begin another run from them."""

from __future__ import annotations

from pathlib import Path

import torch

from vocabfold.checkpoint import load_weights, weights_metadata
from vocabfold.embeddings import EmbeddingSettings
from vocabfold.errors import UserError
from vocabfold.models.build import ModelWithHead, build_model
from vocabfold.settings import load_settings


def load_run(folder: Path, device: torch.device) -> ModelWithHead:
    """The trained model of a finished run, ready to use. Raises UserError for a folder that is not one."""
    settings = load_settings(folder)
    vocabulary_size = weights_metadata(folder).get("vocabulary_size", "")
    if not vocabulary_size.isdecimal():
        raise UserError(f"{folder} holds weights without their vocabulary size: train it again with this version")
    model = build_model(settings.model, settings.head, int(vocabulary_size), embedding=settings.embedding)
    model.settle()
    load_weights(folder, model)
    return model.to(device).eval()


def begin_compressed(model: ModelWithHead, settings: EmbeddingSettings) -> dict[str, float]:
    """Make ``model`` the finished run in ``settings.compressed_from`` with its embedding compressed; what that lost,
    as a column of the result row. {} where the settings name no run. Raises UserError where that run does not fit."""
    if settings.compressed_from is None:
        return {}
    finished = load_run(Path(settings.compressed_from), torch.device("cpu"))
    return {"embedding_relative_error": model.take_over(finished, settings)}
