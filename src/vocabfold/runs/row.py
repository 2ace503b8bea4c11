"""A run's line in the results table, and the columns that follow from its mean losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vocabfold.data.corpora import Corpus
from vocabfold.data.shapes import Shapes
from vocabfold.machine import code_commit, hardware, torch_version
from vocabfold.models.build import ModelWithHead
from vocabfold.runs.settings import Settings

MOST_NATS = 700.0  # beyond that a perplexity is infinite


def evaluation_columns(means: Mapping[str, float], corpus: Corpus | Shapes) -> dict[str, float]:
    """The means of an evaluation with the loss in nats under its name in tables, and what follows from it: perplexity,
    excess over the least loss that the data allow and bits a byte, where these are known."""
    loss = means["validation_loss"]
    result = {"validation_loss_nats": loss}
    result |= {name: value for name, value in means.items() if name != "validation_loss"}
    result["perplexity"] = math.exp(min(loss, MOST_NATS))
    if corpus.entropy_rate_nats is not None:
        result["excess_loss_nats"] = loss - corpus.entropy_rate_nats
    if (bytes_per_token := corpus.valid_bytes_per_token) is not None:
        result["validation_bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return result


def start_columns(settings: Settings, tokens: int, measured: Mapping[str, float]) -> dict[str, Any]:
    """What a run made from a finished one tells of it: the tokens that it was trained on since, and the perplexities
    of that run and of itself before its first step."""
    columns: dict[str, Any] = {"recovery_tokens": tokens if settings.start.type == "compress" else None}
    if settings.start.type == "fold":
        columns["distillation_tokens"] = tokens
    for name in ("teacher", "at_once"):
        if (loss := measured.get(f"{name}_loss_nats")) is not None:
            columns[f"{name}_perplexity"] = math.exp(min(loss, MOST_NATS))
    return columns


def result_row(
    settings: Settings,
    corpus: Corpus | Shapes,
    model: ModelWithHead,
    described: Mapping[str, Any],
    progress: Mapping[str, float],
    final: Mapping[str, float],
    command: str,
) -> dict[str, Any]:
    """The line of a run that has ended. ``described``: columns of its head and embedding; ``progress``: its steps, its
    tokens and what was measured on the way; ``final``: its last evaluation."""
    return {
        "run": settings.run,
        "experiment": settings.experiment,
        **corpus.described,
        "seed": settings.seed,
        "model": settings.model.name,
        "hidden_size": settings.model.hidden_size,
        "num_layers": settings.model.num_layers,
        **described,
        "learning_rate": settings.optimizer.learning_rate,
        **progress,
        "perplexity": final["perplexity"],
        "group_accuracy": final.get("validation_group_accuracy"),
        "num_parameters": model.num_parameters,
        "model_bytes": model.bytes_at_rest,
        **start_columns(settings, int(progress["tokens"]), progress),
        "vocabulary_size": corpus.vocabulary_size,
        **{name: value for name, value in final.items() if name.startswith(("validation_", "excess_"))},
        "hardware": hardware(),
        "torch": torch_version(),
        "commit": code_commit(),
        "command": command,
    }
