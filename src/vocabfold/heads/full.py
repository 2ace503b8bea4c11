"""The full softmax: the definition of truth, one logit for each of the V tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.constants import IGNORE_INDEX
from vocabfold.heads.base import Head, HeadLoss, counted_targets, log_softmax


class FullHead(Head):
    """P(v|h) = softmax(W h)_v with W [V, D]: the input embedding's rows (``tied_weight``) or rows of its own.

    Free rows start as normal(0, ``init_std``); tied rows stay as the embedding has them.
    """

    def __init__(
        self, hidden_size: int, vocabulary_size: int, tied_weight: nn.Parameter | None = None, init_std: float = 0.02
    ) -> None:
        super().__init__(hidden_size, vocabulary_size)
        if tied_weight is None:
            tied_weight = nn.Parameter(torch.empty(vocabulary_size, hidden_size))
            nn.init.normal_(tied_weight, std=init_std)
        self.weight = tied_weight

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` [N, D] -> [N, V]."""
        return F.linear(hidden, self.weight)

    def loss(self, hidden: Tensor, targets: Tensor, with_accuracy: bool = False) -> HeadLoss:
        """See Head.loss. Parts: ``accuracy`` (the likeliest token is the target) where asked for."""
        counted, num_targets = counted_targets(targets)
        logits = self.logits(hidden)
        # One fused call with a sum: torch's own mean is NaN where every target is ignored.
        total = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        parts = {}
        if with_accuracy:
            hits = (logits.detach().argmax(dim=-1) == targets) & counted
            parts["accuracy"] = hits.sum() / num_targets.clamp(min=1)
        return HeadLoss(total / num_targets.clamp(min=1), num_targets, parts)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """See Head.log_prob."""
        return log_softmax(self.logits(hidden))

    def target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See Head.target_log_prob. The full softmax has to build its [N, V] logits for this."""
        return -F.cross_entropy(self.logits(hidden), targets, ignore_index=IGNORE_INDEX, reduction="none")

    def _probability(self, hidden: Tensor) -> Tensor:
        return self.logits(hidden).softmax(dim=-1)  # a pass over [N, V] less than exp(log_prob)
