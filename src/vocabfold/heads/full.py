"""The full softmax: the definition of truth, one logit for each of the V tokens."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.heads.base import Head, HeadLoss, counted_targets, log_softmax, smoothed_log_frequency
from vocabfold.heads.loss_options import check_softcap, in_row_chunks, rowwise_product, soft_cap
from vocabfold.tokens import IGNORE_INDEX


class FullHead(Head):
    """P(v|h) = softmax(W h)_v with W [V, D]: the input embedding's rows (``tied_weight``) or rows of its own.

    Untied rows start as normal(0, ``init_std``); tied rows stay as the embedding has them. ``with_bias`` adds a bias
    [V], 0 at first: see ``start_from_counts``. With a ``softcap`` the logits are cap * tanh((W h + b) / cap). Raises
    UserError for a softcap that is not positive.
    """

    def __init__(
        self,
        hidden_size: int,
        vocabulary_size: int,
        tied_weight: nn.Parameter | None = None,
        init_std: float = 0.02,
        softcap: float | None = None,
        with_bias: bool = False,
    ) -> None:
        check_softcap(softcap)
        super().__init__(hidden_size, vocabulary_size)
        self.softcap = softcap
        self.bias = nn.Parameter(torch.zeros(vocabulary_size)) if with_bias else None
        if tied_weight is None:
            tied_weight = nn.Parameter(torch.empty(vocabulary_size, hidden_size))
            nn.init.normal_(tied_weight, std=init_std)
        self.weight = tied_weight

    @property
    def capturable(self) -> bool:
        """See Head.capturable."""
        return True

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` [N, D] -> [N, V]."""
        return soft_cap(F.linear(hidden, self.weight, self.bias), self.softcap)

    @torch.no_grad()
    def start_from_counts(self, counts: Tensor) -> None:
        """See Head.start_from_counts."""
        if self.bias is None:
            super().start_from_counts(counts)
        else:
            self.bias.copy_(smoothed_log_frequency(counts))

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

    def _log_prob_and_normalisers(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        log_prob = self.target_log_prob(hidden, targets)
        tokens = targets.masked_fill(targets == IGNORE_INDEX, 0)
        logit = rowwise_product(hidden, F.embedding(tokens, self.weight))
        if self.bias is not None:
            logit = logit + self.bias[tokens]
        # log P = logit - log normaliser: one more logit a row tells the normaliser.
        return log_prob, [soft_cap(logit, self.softcap) - log_prob]

    def _mean_log_prob(self, hidden: Tensor, normalisers: list[Tensor]) -> Tensor:
        if self.softcap is not None:
            return super()._mean_log_prob(hidden, normalisers)
        # The mean of all logits is the logit of the mean row.
        mean_bias = 0.0 if self.bias is None else self.bias.mean()
        return rowwise_product(hidden, self.weight.mean(dim=0)) + mean_bias - normalisers[0]


class LeanFullHead(FullHead):
    """A FullHead whose losses come from a function that never holds [N, V]; everything else is FullHead's."""

    @property
    def capturable(self) -> bool:
        """See Head.capturable. Nothing is known of the function."""
        return False

    @abstractmethod
    def _cross_entropy(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """The negative log likelihoods [N], 0 where the target is ignored ("none"), or their sum ("sum")."""

    def loss(self, hidden: Tensor, targets: Tensor, with_accuracy: bool = False) -> HeadLoss:
        """See FullHead.loss. With accuracies the logits are computed once more, a few rows at a time."""
        counted, num_targets = counted_targets(targets)
        divisor = num_targets.clamp(min=1)
        parts = {}
        if with_accuracy:
            with torch.no_grad():
                likeliest = in_row_chunks(lambda rows: self.logits(rows).argmax(dim=-1), hidden, self.vocabulary_size)
            parts["accuracy"] = ((likeliest == targets) & counted).sum() / divisor
        return HeadLoss(self._cross_entropy(hidden, targets, "sum") / divisor, num_targets, parts)

    def target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See Head.target_log_prob. Backward computes the logits once more."""
        return -self._cross_entropy(hidden, targets, "none")
