"""Three symbols a token, P(v|h) = P(u|h) P(g|u, h) P(t|g, h): the group step of a folded head is itself folded.

With V^(1/3) groups of groups, groups in each of them and tokens in each group, a token costs 3 V^(1/3) rows where two
symbols cost 2 V^(1/2): 300 in place of 2,000 at a million tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vocabfold.heads.folded import FoldedHead
from vocabfold.heads.kernels import has_fixed_shapes
from vocabfold.heads.linear import SortedLinearScorer
from vocabfold.heads.loss_options import in_row_chunks
from vocabfold.heads.partition import equal_partition


class NestedFoldedHead(FoldedHead):
    """A FoldedHead whose groups are the tokens of another: about sqrt(G) groups of groups that follow each other, one
    linear layer each, with the same biases and initial standard deviation.

    Its parameters are those of FoldedHead. Top-k and sampling compute P(g | h) of all G groups.
    """

    def _make_group_step(self, init_std: float, with_bias: bool) -> None:
        partition = equal_partition(self.partition.num_groups)
        scorer = SortedLinearScorer(self.hidden_size, partition, init_std=init_std)
        self.groups = FoldedHead(self.hidden_size, partition, scorer, init_std, self.softcap, with_bias)

    def _start_groups_from(self, log_frequency: Tensor) -> None:
        self.groups._start_from(log_frequency)

    def group_log_prob(self, hidden: Tensor) -> Tensor:
        """See FoldedHead.group_log_prob."""
        return self.groups.log_prob(hidden)

    def _group_total(
        self, hidden: Tensor, groups: Tensor, counted: Tensor, with_hits: bool
    ) -> tuple[Tensor, Tensor | None]:
        outer, places = self.groups._group_and_slot(groups, counted)
        total, _ = self.groups._group_total(hidden, outer, counted, with_hits=False)
        total = total + self.groups.scorer.total_log_prob(hidden, outer, places, counted)[0]
        if not with_hits:
            return total, None
        # The likeliest group of groups need not hold the likeliest group.
        return total, ((self._likeliest_groups(hidden) == groups) & counted).sum()

    @torch.no_grad()
    def _likeliest_groups(self, hidden: Tensor) -> Tensor:
        if not has_fixed_shapes(hidden):
            return self.groups.topk(hidden, 1)[1].squeeze(-1)
        return in_row_chunks(lambda rows: self.group_log_prob(rows).argmax(dim=-1), hidden, self.partition.num_groups)

    def _each_group_log_prob(self, hidden: Tensor, groups: Tensor, counted: Tensor) -> Tensor:
        return self.groups.target_log_prob(hidden, groups)

    def _group_log_prob_and_normalisers(
        self, hidden: Tensor, groups: Tensor, counted: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        return self.groups._log_prob_and_normalisers(hidden, groups)
