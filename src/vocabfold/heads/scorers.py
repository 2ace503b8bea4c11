"""The token scorers of a folded head: P(t | g, h) over the slots of a group."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.heads.base import log_softmax
from vocabfold.heads.partition import Partition


class TokenScorer(nn.Module, ABC):
    """Log-probabilities of the slots within groups; a slot that no token owns has log-probability -inf."""

    @abstractmethod
    def target_log_prob(self, hidden: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
        """``hidden`` [N, D], ``groups`` [N], ``slots`` [N] -> log P(slot | group, hidden) [N]. The training path."""

    @abstractmethod
    def group_log_prob(self, hidden: Tensor, groups: Tensor) -> Tensor:
        """``hidden`` [N, D], ``groups`` [N, M] -> log P(. | group, hidden) [N, M, S] for M groups of each row."""

    @abstractmethod
    def position_log_prob(self, hidden: Tensor) -> Tensor:
        """``hidden`` [N, D] -> log P(slot | its group, hidden) [N, V], by position."""


class ScaleShiftScorer(TokenScorer):
    """scale_g * (W_s h) + shift_g: one shared product and 2 G S numbers (arXiv 2411.06371, its fast form).

    The shared W_s [S, D] starts as normal(0, ``init_std``), scales as 1, shifts as 0.
    """

    def __init__(self, hidden_size: int, partition: Partition, init_std: float = 0.02) -> None:
        super().__init__()
        self.partition = partition
        num_groups, num_slots = partition.num_groups, partition.num_slots
        self.shared = nn.Parameter(torch.empty(num_slots, hidden_size))
        nn.init.normal_(self.shared, std=init_std)
        self.scale = nn.Parameter(torch.ones(num_groups, num_slots))
        self.shift = nn.Parameter(torch.zeros(num_groups, num_slots))

    def _masked_shift(self) -> Tensor:
        # Masking the [G, S] parameter instead of the [N, S] logits costs nothing that grows with N.
        return self.shift.masked_fill(~self.partition.slot_exists, -torch.inf)

    def target_log_prob(self, hidden: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
        """See TokenScorer.target_log_prob."""
        scale, shift = F.embedding(groups, self.scale), F.embedding(groups, self._masked_shift())
        logits = torch.addcmul(shift, scale, F.linear(hidden, self.shared).to(scale.dtype))
        return -F.cross_entropy(logits, slots, reduction="none")

    def group_log_prob(self, hidden: Tensor, groups: Tensor) -> Tensor:
        """See TokenScorer.group_log_prob."""
        shared = F.linear(hidden, self.shared).unsqueeze(1)
        return log_softmax(self.scale[groups] * shared + self._masked_shift()[groups])

    def position_log_prob(self, hidden: Tensor) -> Tensor:
        """See TokenScorer.position_log_prob."""
        shared = F.linear(hidden, self.shared).unsqueeze(1)
        log_prob = log_softmax(self.scale * shared + self._masked_shift())
        return log_prob[:, self.partition.slot_exists]


class LoopedLinearScorer(TokenScorer):
    """W_g h + b_g: one linear layer a group, applied in a loop over the groups with masks (the paper's slow listing).

    ``tied_weight`` [V, D], in token order, lends the rows of the input embedding; without it the rows are free,
    stored by position, and start as normal(0, ``init_std``).
    """

    def __init__(
        self,
        hidden_size: int,
        partition: Partition,
        tied_weight: nn.Parameter | None = None,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.partition = partition
        self.tied = tied_weight is not None
        if tied_weight is None:
            tied_weight = nn.Parameter(torch.empty(partition.vocabulary_size, hidden_size))
            nn.init.normal_(tied_weight, std=init_std)
        self.weight = tied_weight
        self.bias = nn.Parameter(torch.zeros(partition.vocabulary_size))

    def _log_prob_of_group(self, hidden: Tensor, group: int) -> Tensor:
        start, stop = self.partition.boundaries[group], self.partition.boundaries[group + 1]
        rows = self.weight[self.partition.order[start:stop]] if self.tied else self.weight[start:stop]
        return log_softmax(F.linear(hidden, rows, self.bias[start:stop]))

    def target_log_prob(self, hidden: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
        """See TokenScorer.target_log_prob."""
        result = hidden.new_zeros(len(hidden), dtype=torch.promote_types(self.bias.dtype, torch.float32))
        for group in groups.unique().tolist():
            members = (groups == group).nonzero().squeeze(-1)
            log_prob = self._log_prob_of_group(hidden[members], group)
            chosen = log_prob.gather(-1, slots[members].unsqueeze(-1)).squeeze(-1)
            result = result.index_put((members,), chosen)
        return result

    def group_log_prob(self, hidden: Tensor, groups: Tensor) -> Tensor:
        """See TokenScorer.group_log_prob."""
        dtype = torch.promote_types(self.bias.dtype, torch.float32)
        result = hidden.new_full((*groups.shape, self.partition.num_slots), -torch.inf, dtype=dtype)
        for group in groups.unique().tolist():
            rows, columns = (groups == group).nonzero(as_tuple=True)
            log_prob = self._log_prob_of_group(hidden[rows], group)
            result[rows, columns, : log_prob.shape[-1]] = log_prob
        return result

    def position_log_prob(self, hidden: Tensor) -> Tensor:
        """See TokenScorer.position_log_prob."""
        return torch.cat([self._log_prob_of_group(hidden, group) for group in range(self.partition.num_groups)], dim=-1)
