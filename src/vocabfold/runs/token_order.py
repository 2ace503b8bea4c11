"""The order of the vocabulary that a head is built on, from the training stream or from a finished run."""

from __future__ import annotations

from pathlib import Path

import safetensors
from torch import Tensor

from vocabfold.errors import UserError
from vocabfold.heads.build import vocabulary_order, wanted_order
from vocabfold.heads.settings import HeadSettings
from vocabfold.runs.checkpoint import WEIGHTS_NAME
from vocabfold.tokens import TokenStream


def token_order(settings: HeadSettings, vocabulary_size: int, tokens: TokenStream) -> Tensor | None:
    """``vocabulary_order``, clustered by the run that the settings name where they name one. Raises UserError where
    that run cannot be read too."""
    source, embedding = settings.partition.clustered_from, None
    if wanted_order(settings) in ("clustered", "exchanged") and source is not None:
        embedding = saved_embedding(Path(source), vocabulary_size)
    return vocabulary_order(settings, vocabulary_size, tokens, embedding)


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
