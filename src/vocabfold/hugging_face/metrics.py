"""What training and judging a language model ask of its logits, without logits [N, V].

For models of transformers as they are, folded ones, both with PEFT's adapters too, and, where no gradient is wanted,
with a screened output layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vocabfold.errors import UserError
from vocabfold.heads.base import Head
from vocabfold.heads.full import FullHead
from vocabfold.heads.loss_options import ROW_CHUNK_ELEMENTS
from vocabfold.hugging_face.full_head import full_head
from vocabfold.hugging_face.models import backbone, without_wrapper
from vocabfold.hugging_face.screened_head import ScreenedHead
from vocabfold.tokens import IGNORE_INDEX


def token_log_probs(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **inputs: Any
) -> Tensor:
    """log P of each token given those before it, in nats: ``input_ids`` [B, T] -> [B, T - 1], with gradients.

    The sums over a row are what DPO compares, the single numbers what GRPO weighs. ``labels`` [B, T]: other targets
    than ``input_ids``. 0 where the label is -100 or the ``attention_mask`` is 0 at the token or before it. ``inputs``
    go to the model. Full softmax: a few rows of logits at a time, computed again in the backward pass.
    """
    hidden, targets = _states_and_targets(model, input_ids, attention_mask, labels, inputs)
    head = head_of(model)
    rows = hidden.flatten(0, 1)
    result = _full_log_prob(head, rows, targets.flatten()) if isinstance(head, FullHead) else None
    if result is None:
        result = head.target_log_prob(rows, targets.flatten())
    return result.view(targets.shape)


def entropy(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **inputs: Any
) -> Tensor:
    """The entropy in nats of what the model expects at each place that ``token_log_probs`` scores: [B, T - 1], with
    gradients; 0 where there is no target."""
    hidden, targets = _states_and_targets(model, input_ids, attention_mask, labels, inputs)
    head, counted = head_of(model), targets != IGNORE_INDEX
    values = head.entropy(hidden[counted])
    return torch.zeros(targets.shape, dtype=values.dtype, device=values.device).masked_scatter(counted, values)


@torch.no_grad()
def accuracy(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    screened: ScreenedHead | None = None,
    **inputs: Any,
) -> Tensor:
    """The share of targets that are the likeliest token: from 0 to 1, 0 without targets.

    ``screened``: what ``screen(model)`` gave, to find the likeliest token with.
    """
    hidden, targets = _states_and_targets(model, input_ids, attention_mask, labels, inputs)
    counted = targets != IGNORE_INDEX
    rows, wanted = hidden[counted], targets[counted]
    if screened is not None:
        likeliest = screened.greedy(rows)
        return (likeliest == wanted).sum() / max(1, len(wanted))
    head = head_of(model)
    hits = torch.zeros((), dtype=torch.int64, device=rows.device)
    for some, those in _chunks(rows, wanted, head.vocabulary_size):
        best = head.logits(some).argmax(dim=-1) if isinstance(head, FullHead) else head.topk(some, 1)[1].squeeze(-1)
        hits += (best == those).sum()
    return hits / max(1, len(wanted))


def head_of(model: Any) -> Head:
    """The output layer of a model as a head. Raises UserError for a model that has no plain one."""
    head = getattr(without_wrapper(model), "head", None)
    # PEFT's modules_to_save=["head"] lends the methods of the head that is in use.
    head = getattr(getattr(head, "target_log_prob", None), "__self__", None)
    return head if isinstance(head, Head) else full_head(model, "measure", with_adapters=True)


def _states_and_targets(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, inputs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(hidden states [B, T - 1, D], targets [B, T - 1])."""
    if input_ids.dim() != 2 or (labels is not None and labels.shape != input_ids.shape):
        raise UserError(f"tokens are {tuple(input_ids.shape)}: give [B, T], and labels of the same shape")
    targets = (input_ids if labels is None else labels)[:, 1:]
    if attention_mask is not None:
        # A text that is padded on the left begins after padding, which says nothing of its first token.
        padded = (attention_mask[:, 1:] == 0) | (attention_mask[:, :-1] == 0)
        targets = targets.masked_fill(padded, IGNORE_INDEX)
    output = backbone(model, with_adapters=True)(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs
    )
    return output.last_hidden_state[:, :-1], targets


def _chunks(rows: Tensor, targets: Tensor, vocabulary_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    step = max(1, ROW_CHUNK_ELEMENTS // vocabulary_size)
    return zip(rows.split(step), targets.split(step), strict=True)


def _full_log_prob(head: FullHead, rows: Tensor, targets: Tensor) -> Tensor:
    def of_chunk(some: Tensor, those: Tensor) -> Tensor:
        logits = head.logits(some)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -F.cross_entropy(logits, those, ignore_index=IGNORE_INDEX, reduction="none")

    parts = list(_chunks(rows, targets, head.vocabulary_size))
    if not torch.is_grad_enabled():
        return torch.cat([of_chunk(*part) for part in parts])
    return torch.cat([checkpoint(of_chunk, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
