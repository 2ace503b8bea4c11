"""The order of the vocabulary that a head is built on, from the training stream or from a finished run."""

from __future__ import annotations

from pathlib import Path

import safetensors
import torch
from torch import Tensor

from vocabfold.errors import UserError
from vocabfold.heads.build import wanted_order
from vocabfold.heads.orders import clustered_order, cooccurrence_embedding, frequency_order, random_order
from vocabfold.heads.partition import equal_boundaries
from vocabfold.heads.settings import HeadSettings
from vocabfold.runs.checkpoint import WEIGHTS_NAME
from vocabfold.tokens import TokenStream, token_counts


def token_order(settings: HeadSettings, vocabulary_size: int, tokens: TokenStream) -> Tensor | None:
    """The order [V] that ``settings`` ask for, counted on the training stream ``tokens`` where it depends on it; None
    for a head without a partition. Raises UserError for an order or sizes that no partition has, or where the run to
    cluster from cannot be read."""
    partition, order = settings.partition, wanted_order(settings)
    if order is None:
        return None
    if order == "bpe":
        return torch.arange(vocabulary_size)
    if order == "random":
        return random_order(vocabulary_size, partition.seed)
    counts = token_counts(tokens, vocabulary_size)
    if order == "frequency":
        return frequency_order(counts)
    boundaries = equal_boundaries(vocabulary_size, partition.group_size, partition.shortlist)
    if partition.clustered_from is None:
        embedding = cooccurrence_embedding(tokens, vocabulary_size, counts)
    else:
        embedding = saved_embedding(Path(partition.clustered_from), vocabulary_size)
    return clustered_order(embedding, boundaries, frequency_order(counts)[: partition.shortlist], counts > 0)


def saved_embedding(folder: Path, vocabulary_size: int) -> Tensor:
    """The input embedding [V, D] of a finished run. Raises UserError where there is none of this vocabulary."""
    path = folder / WEIGHTS_NAME
    try:
        with safetensors.safe_open(path, framework="pt") as weights:
            kept = {name for name in weights.keys() if name.startswith("backbone.token_embedding.")}  # noqa: SIM118
            if kept - {"backbone.token_embedding.weight"}:
                raise UserError(f"{path} holds a compressed input embedding: name a run with embedding=dense")
            # safetensors keeps one name of a tied weight, and which one is its own choice.
            for name in ("backbone.token_embedding.weight", "head.weight", "head.scorer.weight"):
                if name in weights.keys():  # noqa: SIM118 (the reader is no mapping)
                    embedding: Tensor = weights.get_tensor(name)
                    break
            else:
                raise UserError(f"{path} holds no input embedding: name the folder of a language model's run")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"head.partition.clustered_from={folder}: {path.name} cannot be read ({error})") from error
    if len(embedding) != vocabulary_size:
        raise UserError(
            f"{path} was trained on {len(embedding)} tokens, this corpus has {vocabulary_size}: "
            "name a run with the same tokenizer"
        )
    return embedding
