"""Adaptive softmax (arXiv 1609.04309) with the layers of torch.nn.AdaptiveLogSoftmaxWithLoss: frequent tokens have a
row of their own, rarer ones a cluster and, within it, a smaller product.

It is a folded softmax: the tokens before the first cutoff are groups of one token, each cluster is a group. torch's own
forward knows no ignored targets, fails under autocast and asks for tokens in frequency order; its layers do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.errors import UserError
from vocabfold.heads.folded import FoldedHead
from vocabfold.heads.kernels import sum_dtype
from vocabfold.heads.loss_options import rowwise_product, soft_cap
from vocabfold.heads.partition import Partition
from vocabfold.heads.scorers import TokenScorer


class ClusterScorer(TokenScorer):
    """For each cluster W_tokens (W_down h), the ``tail`` of torch's module: D -> D / div_value^i -> its tokens."""

    def __init__(self, partition: Partition, tail: nn.ModuleList) -> None:
        super().__init__(partition)
        self.tail = tail

    def _members(self, index: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(a cluster, the rows [N] whose ``index`` it is). A cluster without a row is computed for none: its weights
        then have gradients of zero, as DDP expects of every weight, and not none at all."""
        for cluster in range(len(self.tail)):
            yield cluster, (index == cluster).nonzero().squeeze(-1)

    def _logits(self, hidden: Tensor, cluster: int) -> Tensor:
        return soft_cap(self.tail[cluster](hidden), self.softcap)

    def target_log_prob(self, hidden: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
        """See TokenScorer.target_log_prob."""
        result = hidden.new_zeros(len(hidden), dtype=sum_dtype(hidden.dtype))
        for cluster, rows in self._members(self.partition.index_of(groups)):
            chosen = -F.cross_entropy(self._logits(hidden[rows], cluster), slots[rows], reduction="none")
            result = result.index_put((rows,), chosen.to(result.dtype))
        return result

    def total_log_prob(
        self, hidden: Tensor, groups: Tensor, slots: Tensor, counted: Tensor, with_hits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See TokenScorer.total_log_prob. The token before the first cutoff is certain, and a hit."""
        total = hidden.new_zeros((), dtype=sum_dtype(hidden.dtype))
        hits = (counted & (self.partition.sizes[groups] == 1)).sum() if with_hits else None
        for cluster, rows in self._members(self.partition.index_of(groups).masked_fill(~counted, -1)):
            logits = self._logits(hidden[rows], cluster)
            total = total - F.cross_entropy(logits, slots[rows], reduction="sum")
            if hits is not None:
                hits = hits + (logits.detach().argmax(dim=-1) == slots[rows]).sum()
        return total, hits

    def _target_logit(self, hidden: Tensor, index: Tensor, slots: Tensor) -> Tensor:
        result = hidden.new_zeros(len(hidden), dtype=sum_dtype(hidden.dtype))
        for cluster, rows in self._members(index):
            down, tokens = cast(nn.Sequential, self.tail[cluster])
            logit = rowwise_product(down(hidden[rows]), F.embedding(slots[rows], cast(Tensor, tokens.weight)))
            result = result.index_put((rows,), logit.to(result.dtype))
        return result

    def _slot_log_prob(self, hidden: Tensor, index: Tensor) -> Tensor:
        shape = (*index.shape, self.partition.num_slots)
        result = hidden.new_full(shape, -torch.inf, dtype=sum_dtype(hidden.dtype))
        for cluster in index.unique().tolist():
            rows, columns = (index == cluster).nonzero(as_tuple=True)
            log_prob = self._log_softmax(self.tail[cluster](hidden[rows]))
            result[rows, columns, : log_prob.shape[-1]] = log_prob
        return result

    def _all_log_prob(self, hidden: Tensor) -> Tensor:
        return torch.cat([self._log_softmax(layers(hidden)) for layers in self.tail], dim=-1)


class AdaptiveHead(FoldedHead):
    """``order`` [V]: the tokens from the most frequent down; it is saved with the weights. None: token order.

    The first of ``cutoffs`` positions have rows of their own, each further cutoff ends a cluster; cutoffs at V or
    beyond are dropped. Cluster i has hidden_size // div_value^i hidden units. All weights start as torch's layers do.
    Raises UserError for cutoffs that do not rise from 1, none below V, or a cluster without a hidden unit.
    """

    def __init__(
        self,
        hidden_size: int,
        vocabulary_size: int,
        cutoffs: Sequence[int] = (2000, 10_000),
        div_value: float = 4.0,
        order: Tensor | None = None,
        softcap: float | None = None,
    ) -> None:
        if list(cutoffs) != sorted(set(cutoffs)) or min(cutoffs, default=0) < 1:
            raise UserError(
                f"head.cutoffs is {list(cutoffs)}: choose one or more rising positions, the first at least 1"
            )
        kept = [cutoff for cutoff in cutoffs if cutoff < vocabulary_size]
        if not kept:
            raise UserError(
                f"head.cutoffs is {list(cutoffs)}, none below the vocabulary size {vocabulary_size}: choose smaller "
                "ones, or head=full"
            )
        if not div_value > 0 or hidden_size // div_value ** len(kept) < 1:
            raise UserError(
                f"head.div_value {div_value} leaves cluster {len(kept)} none of {hidden_size} hidden units: choose a "
                "smaller div_value, at least 1, or fewer head.cutoffs"
            )
        layers = nn.AdaptiveLogSoftmaxWithLoss(hidden_size, vocabulary_size, kept, div_value)
        if order is None:
            order = torch.arange(vocabulary_size)
        boundaries = torch.tensor([*range(kept[0]), *kept, vocabulary_size])
        partition = Partition(order, boundaries)
        # The token of a cluster of one is certain: nothing is left to score.
        tail = nn.ModuleList(layers.tail[i] for i, size in enumerate(partition.sizes[kept[0] :].tolist()) if size > 1)
        super().__init__(hidden_size, partition, ClusterScorer(partition, tail), softcap=softcap)
        self.group_weight = cast(nn.Parameter, layers.head.weight)
