"""One linear layer a group on a hidden state that has seen the group: h_g = h + W_2 gelu(W_1 norm(h) + e_g).

The group is known before its token is scored, so that the second step can be an autoregressive one: what the backbone
says is read again in the light of the group, which a full softmax cannot do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.errors import UserError
from vocabfold.heads.linear import SortedLinearScorer
from vocabfold.heads.partition import Partition

PAIRS_A_TIME = 1 << 14  # of a hidden state and a group, when a row asks for many groups


def default_width(hidden_size: int) -> int:
    """The width of W_1: a few times the hidden size where that is small, and never more than 1,024."""
    return min(4 * hidden_size, 1024)


class ConditionedLinearScorer(SortedLinearScorer):
    """SortedLinearScorer on h_g. W_1 [width, D] starts as torch's own layers do, the e_g [M, width] as normal(0, 0.02)
    and W_2 [D, width] as 0: at first the scorer is SortedLinearScorer. Raises UserError for a width below 1."""

    def __init__(
        self,
        hidden_size: int,
        partition: Partition,
        width: int | None = None,
        tied_weight: nn.Parameter | None = None,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, partition, tied_weight, init_std)
        width = default_width(hidden_size) if width is None else width
        if width < 1:
            raise UserError(f"head.condition_width is {width}: choose at least 1, or head.scorer=linear_sorted")
        self.into = nn.Linear(hidden_size, width, bias=False)
        self.group_embedding = nn.Parameter(torch.empty(len(partition.multi_groups), width))
        nn.init.normal_(self.group_embedding, std=0.02)
        self.out = nn.Parameter(torch.zeros(hidden_size, width))

    def condition(self, hidden: Tensor, groups: Tensor) -> Tensor:
        """``hidden`` [..., D] and ``groups`` [...] that broadcast against each other -> h_g [..., D]. A group of one
        token has nothing to score and takes any other's e_g."""
        if len(self.partition.multi_groups) == 0:
            return hidden
        index = self.partition.multi_index[groups].clamp(min=0)
        inner = self.into(F.layer_norm(hidden, hidden.shape[-1:])) + F.embedding(index, self.group_embedding)
        return hidden + F.linear(F.gelu(inner), self.out)

    def total_log_prob(
        self, hidden: Tensor, groups: Tensor, slots: Tensor, counted: Tensor, with_hits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See TokenScorer.total_log_prob."""
        return super().total_log_prob(self.condition(hidden, groups), groups, slots, counted, with_hits)

    def target_log_prob(self, hidden: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
        """See TokenScorer.target_log_prob."""
        return super().target_log_prob(self.condition(hidden, groups), groups, slots)

    def target_logit(self, hidden: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
        """See TokenScorer.target_logit."""
        return super().target_logit(self.condition(hidden, groups), groups, slots)

    def group_log_prob(self, hidden: Tensor, groups: Tensor) -> Tensor:
        """See TokenScorer.group_log_prob. Each pair of a row and a group has a hidden state of its own."""
        pairs = groups.reshape(-1, 1)
        rows = torch.arange(len(hidden), device=hidden.device).repeat_interleave(groups.shape[1])
        parts = [
            super(ConditionedLinearScorer, self).group_log_prob(self.condition(hidden[some], group[:, 0]), group)
            for some, group in zip(rows.split(PAIRS_A_TIME), pairs.split(PAIRS_A_TIME), strict=True)
        ]
        return torch.cat(parts).view(*groups.shape, self.partition.num_slots)

    def _all_log_prob(self, hidden: Tensor) -> Tensor:
        groups = self.partition.multi_groups.split(1)
        return torch.cat(
            [
                self._log_softmax(F.linear(self.condition(hidden, group), *layer))
                for group, layer in zip(groups, self._layers(), strict=True)
            ],
            dim=-1,
        )
