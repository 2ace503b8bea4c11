"""Loss of a finished model, document by document: each text is read alone, from its own first token.

A text is cut into pieces of at most ``context`` + 1 tokens that share one token, the last input of which is the first
of the next: every token but the text's first is predicted exactly once, a later piece's first ones with little before
them. Checks on SmolLM2-135M-Instruct (Q4_1): 2.216 nats a token on the first 98 stories of TinyStories' validation text
(20,118 predicted tokens), 2.825 on the first five articles of WikiText-2's (24,089; cut otherwise: docs/measuring.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from vocabfold.data.sources import wikitext_articles
from vocabfold.data.tokenizer import END_OF_TEXT
from vocabfold.errors import UserError

CONTEXT = 1024
ROWS_AT_A_TIME = 256  # hidden states whose logits are held together: 48 MiB at V = 49,152


@dataclass(frozen=True)
class Piece:
    """``ids`` [T + 1]: T inputs, and T targets one further. ``document``: the number of the text that they are from."""

    document: int
    ids: Tensor

    @property
    def num_targets(self) -> int:
        """T."""
        return len(self.ids) - 1


def read_texts(path: str | Path) -> list[str]:
    """The documents of a UTF-8 file: the parts between lines ``<|endoftext|>`` or, without any, WikiText's articles.

    Blank lines around them and empty parts are left out. Raises UserError for a file that cannot be read or has none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    lines = text.splitlines(keepends=True)
    if END_OF_TEXT in text:
        parts: Iterable[str] = f"{text}\n".split(f"{END_OF_TEXT}\n")
    else:
        parts = wikitext_articles(lines)
    documents = [part.strip("\r\n") for part in parts if part.strip()]
    if not documents:
        raise UserError(f"{path} holds no text")
    return documents


def pieces_of(
    tokenizer: Any,
    texts: Sequence[str],
    context: int = CONTEXT,
    most_targets: int | None = None,
    most_of_document: int | None = None,
) -> list[Piece]:
    """``texts`` as pieces of at most ``context`` inputs: whole texts, or the first ``most_of_document`` targets of
    each, until there are ``most_targets`` or more (None: all texts). Raises UserError without anything to predict.
    """
    pieces: list[Piece] = []
    num_targets = 0
    for document, text in enumerate(texts):
        if most_targets is not None and num_targets >= most_targets:
            break
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
        if most_of_document is not None:
            ids = ids[: most_of_document + 1]
        starts = range(0, len(ids) - 1, context)
        pieces += [Piece(document, ids[start : start + context + 1]) for start in starts]
        num_targets += max(0, len(ids) - 1)
    if not pieces:
        raise UserError("no token to predict: give a text of at least two tokens")
    return pieces


@torch.inference_mode()
def piece_states(model: Any, piece: Piece) -> Tensor:
    """The last hidden states [T, D], those that ``lm_head`` reads, of one piece."""
    hidden: Tensor = model.base_model(input_ids=piece.ids[:-1].unsqueeze(0), use_cache=False).last_hidden_state[0]
    return hidden


@torch.inference_mode()
def state_losses(hidden: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
    """``hidden`` [N, D] and ``targets`` [N] -> the loss of each in nats [N], float32. Logits: a few rows at a time."""
    parts = [
        F.cross_entropy(logits_of(rows).float(), some, reduction="none")
        for rows, some in zip(hidden.split(ROWS_AT_A_TIME), targets.split(ROWS_AT_A_TIME), strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0)


def by_document(documents: Sequence[int], losses: Sequence[float]) -> pd.DataFrame:
    """Columns document, tokens, loss_nats (the sum over them): what ``statistics.paired_bootstrap`` compares."""
    grouped = pd.Series(losses, dtype="float64").groupby(pd.Series(documents))
    table = pd.DataFrame({"tokens": grouped.size(), "loss_nats": grouped.sum()})
    return table.rename_axis("document").reset_index()


def document_losses(model: Any, pieces: Sequence[Piece]) -> pd.DataFrame:
    """The table of ``by_document`` of a causal language model of transformers, through its own output layer."""
    documents: list[int] = []
    losses: list[float] = []
    for piece in pieces:
        hidden = piece_states(model, piece)
        losses += state_losses(hidden, piece.ids[1:], model.get_output_embeddings()).tolist()
        documents += [piece.document] * piece.num_targets
    return by_document(documents, losses)


def mean_loss(table: pd.DataFrame) -> float:
    """Nats a token over all documents of ``document_losses``."""
    return float(table["loss_nats"].sum() / table["tokens"].sum())
