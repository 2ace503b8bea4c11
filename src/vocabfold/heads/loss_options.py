"""What a loss may hold beyond the mean negative log likelihood, and how anything over V is computed in a few rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vocabfold.errors import UserError

REDUCTIONS = ("mean", "sum", "none")
ROW_CHUNK_ELEMENTS = 1 << 23  # log-probabilities held at a time: 32 MiB in fp32


@dataclass(frozen=True)
class LossOptions:
    """The loss of a target y is

        (1 - label_smoothing) * -log P(y) + label_smoothing * mean over the V tokens of -log P(v) + z_loss * sum of z^2

    with z the log normaliser (log of the sum of exp(logits)) of each softmax that the target takes part in: one for a
    full softmax; for a folded head that of the groups and that of the tokens in the target's group, where this has more
    than one. ``reduction``: "mean" over the targets that count, their "sum", or "none" for one loss a row [N], 0 where
    the target is ignored. Label smoothing: arXiv 1512.00567, over all V tokens, the target included, as in torch;
    z-loss: arXiv 2204.02311, section 5. Raises UserError for numbers that no loss has.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    reduction: str = "mean"

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise UserError(f"head.label_smoothing is {self.label_smoothing}: choose between 0 (none) and 1")
        if not 0 <= self.z_loss < math.inf:
            raise UserError(f"head.z_loss is {self.z_loss}: choose 0 (none) or more; 1e-4 is usual")
        if self.reduction not in REDUCTIONS:
            raise UserError(f"reduction is {self.reduction!r}: choose one of {', '.join(REDUCTIONS)}")


def check_softcap(softcap: float | None) -> None:
    """Raise UserError unless ``softcap`` is None or a positive number."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise UserError(f"head.softcap is {softcap}: choose more than 0, or null for none; 30 is usual")


def soft_cap(logits: Tensor, softcap: float | None) -> Tensor:
    """cap * tanh(logits / cap), as in Gemma 2 (arXiv 2408.00118): no logit beyond the cap. None: as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def rowwise_product(first: Tensor, second: Tensor) -> Tensor:
    """The dot products of the rows of two [N, D], in float32 at least: [N]."""
    dtype = torch.promote_types(first.dtype, torch.float32)
    return (first.to(dtype) * second.to(dtype)).sum(dim=-1)


def in_row_chunks(function: Callable[[Tensor], Tensor], hidden: Tensor, num_choices: int) -> Tensor:
    """``function`` of ``hidden`` [N, D], a few rows at a time, so that [N, num_choices] is never held. Where gradients
    are wanted, backward computes each part again."""
    rows = max(1, ROW_CHUNK_ELEMENTS // num_choices)
    if not torch.is_grad_enabled():
        return torch.cat([function(part) for part in hidden.split(rows)])
    parts = [checkpoint(function, part, use_reentrant=False, preserve_rng_state=False) for part in hidden.split(rows)]
    return torch.cat(parts)
