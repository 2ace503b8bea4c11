"""Output layers that the experiment on decoding compares, and how far one that is not exact is from the model's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.study.statistics import paired_bootstrap
from vocabfold.data.tokenizer import END_OF_TEXT
from vocabfold.errors import UserError
from vocabfold.heads.base import log_softmax
from vocabfold.heads.sampling import draw_from_whole
from vocabfold.hugging_face import ScreenedHead

STATES_AT_A_TIME = 128


class OutputLayer(Protocol):
    """What ``generate`` asks of an output layer."""

    def sample(
        self,
        hidden: Tensor,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``hidden`` [N, D] -> a token of each [N]."""


class WholeLayer:
    """``logits_of``: states [N, D] -> logits [N, V], of all tokens. Draws need all probabilities."""

    def __init__(self, logits_of: Callable[[Tensor], Tensor]) -> None:
        self.logits_of = logits_of

    def sample(
        self,
        hidden: Tensor,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As ``OutputLayer``; ``top_k`` is not compared and must be None."""
        assert top_k is None
        logits = self.logits_of(hidden)
        if temperature == 0:
            return logits.argmax(dim=-1)
        return draw_from_whole(log_softmax(logits), temperature, top_p, generator)


def rounded_logits(head: ScreenedHead) -> Callable[[Tensor], Tensor]:
    """The int8 product of rows and states without its bounds: fast, and not always the model's tokens."""
    quantised = head.quantised

    def logits_of(hidden: Tensor) -> Tensor:
        states = quantised.round_states(hidden, parts=1)
        product = quantised.product(states.steps)[:, : head.vocabulary_size]
        return product.mul_(states.scale.float().unsqueeze(-1))

    return logits_of


def stories_of(path: Path) -> list[str]:
    """The documents of a text, each followed by a line ``<|endoftext|>``. Raises UserError where there is none."""
    try:
        parts = path.read_text(encoding="utf-8").split(END_OF_TEXT)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    documents = [part.strip() for part in parts if part.strip()]
    if len(documents) < 2:
        raise UserError(f"{path} holds {len(documents)} documents: at least two are needed")
    return documents


@torch.inference_mode()
def distance(
    model: Any, head: ScreenedHead, documents: Sequence[Tensor], logits_of: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """How far ``logits_of`` is from the model's own output layer on ``documents`` (ids [L] each, read alone).

    The mean of KL(own || other) in nats a token, the ratio of perplexities with its 95% interval over documents, the
    share of positions where both have the same likeliest token, and where ``head`` has the one of the own layer.
    """
    rows, divergence, same, screened = model.get_output_embeddings().weight, 0.0, 0, 0
    losses: list[list[float]] = [[], []]
    for ids in documents:
        hidden, targets = model.base_model(input_ids=ids.unsqueeze(0), use_cache=False).last_hidden_state[0], ids[1:]
        sums = [0.0, 0.0]
        for some, wanted in zip(hidden[:-1].split(STATES_AT_A_TIME), targets.split(STATES_AT_A_TIME), strict=True):
            dense = F.linear(some, rows)
            own, other = log_softmax(dense), log_softmax(logits_of(some))
            divergence += float((own.exp() * (own - other)).sum())
            same += int((own.argmax(dim=-1) == other.argmax(dim=-1)).sum())
            screened += int((head.greedy(some) == dense.argmax(dim=-1)).sum())
            for index, each in enumerate((own, other)):
                sums[index] -= float(each.gather(-1, wanted.unsqueeze(-1)).sum())
        for kept, total in zip(losses, sums, strict=True):
            kept.append(total)
    tokens = np.array([len(ids) - 1 for ids in documents])
    own_nats, other_nats = (np.array(kept) for kept in losses)
    difference = paired_bootstrap(other_nats, own_nats, tokens)
    count = int(tokens.sum())
    return {
        "tokens_read": count,
        "perplexity": float(np.exp(own_nats.sum() / count)),
        "kl_nats": divergence / count,
        "perplexity_ratio": float(np.exp((other_nats.sum() - own_nats.sum()) / count)),
        "perplexity_ratio_low": float(np.exp(difference.low)),
        "perplexity_ratio_high": float(np.exp(difference.high)),
        "agreement": same / count,
        "screened_agreement": screened / count,
    }
