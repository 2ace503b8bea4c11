"""The order of the vocabulary that a head is built on, from the training stream or from a finished run.

What is learned from a stream takes half a minute for millions of tokens and is kept beside the token files: the runs of
a sweep learn it once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import safetensors
import torch
from filelock import FileLock
from torch import Tensor

from vocabfold.errors import UserError
from vocabfold.files import replacing
from vocabfold.heads.settings import HeadSettings, PartitionSettings
from vocabfold.heads.vocabulary_order import vocabulary_order, wanted_order
from vocabfold.runs.checkpoint import WEIGHTS_NAME
from vocabfold.tokens import BLOCK_TOKENS, TokenStream

LEARNING_VERSION = 1  # of heads/orders.py and exchange.py: another one learns other orders from the same stream


def token_order(
    settings: HeadSettings, vocabulary_size: int, tokens: TokenStream, cache_dir: Path | None = None
) -> Tensor | None:
    """``vocabulary_order``, clustered by the run that the settings name where they name one. An order learned from
    ``tokens`` is kept in ``cache_dir``, where one is given. Raises UserError where that run cannot be read too."""
    source, order = settings.partition.clustered_from, wanted_order(settings)
    if order in ("clustered", "exchanged") and source is not None:
        return vocabulary_order(settings, vocabulary_size, tokens, saved_embedding(Path(source), vocabulary_size))

    def learn() -> Tensor | None:
        return vocabulary_order(settings, vocabulary_size, tokens)

    mixture = settings.mixture if settings.type == "mixture" else []
    wanted = mixture or [str(order)]
    if cache_dir is None or not any(one.startswith(("clustered", "exchanged")) for one in wanted):
        return learn()
    default = asdict(PartitionSettings())  # an option that is added later, and off, learns no order again
    key = {
        "learning_version": LEARNING_VERSION,
        "tokens_sha256": _stream_sha256(tokens),
        "vocabulary_size": vocabulary_size,
        "partition": {name: value for name, value in asdict(settings.partition).items() if value != default[name]},
        "mixture": mixture,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return _kept(cache_dir.expanduser() / f"order-{digest[:16]}.npy", vocabulary_size, learn)


def _stream_sha256(tokens: TokenStream) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(tokens), BLOCK_TOKENS):
        digest.update(tokens[start : start + BLOCK_TOKENS].astype("<u4").tobytes())
    return digest.hexdigest()


def _kept(path: Path, vocabulary_size: int, learn: Callable[[], Tensor | None]) -> Tensor | None:
    """The order at ``path``, or what ``learn`` returns, which is then put there; others wait meanwhile."""
    if (order := _read_order(path, vocabulary_size)) is not None:
        return order
    with contextlib.ExitStack() as stack:
        # a cache that cannot be written costs time, no result
        with contextlib.suppress(OSError, NotImplementedError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.with_name(f".{path.name}.lock")))
        if (order := _read_order(path, vocabulary_size)) is not None:
            return order
        order = learn()
        if order is not None:
            with contextlib.suppress(OSError), replacing(path) as beside, beside.open("wb") as file:
                np.save(file, order.numpy().astype(np.int32))
        return order


def _read_order(path: Path, vocabulary_size: int) -> Tensor | None:
    """None where there is none, or none of this vocabulary: a damaged one is learned again."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        order = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.int64))
        if torch.equal(order.sort(dim=-1).values, torch.arange(vocabulary_size).expand_as(order)):
            return order
    return None


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
