"""A folded head for a model that was trained with a full softmax: its groups can be scored by more than one product.

The full softmax's P(g|h) is softmax of z_g(h) = logsumexp of the logits of group g's tokens (see heads/fold.py). Here

    s(h) = W_group h + b, for groups of more than one token plus V gelu(U norm(h)) where there is a ``width``,

stands for z, and the ``visited`` groups that s ranks first get their z_g itself, from the tokens' own rows. The other
groups of more than one token keep their s, all moved by logsumexp z - logsumexp s of the visited ones: a fit by softmax
leaves open how high all s are together, and next to z itself that counts. Softmax of the result is P(g|h): a
distribution, whichever groups were visited, and nearer to the full softmax's the more they are. A group of one token
has its token's row in W_group and is exact from the start.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.errors import UserError
from vocabfold.heads.base import counted_targets
from vocabfold.heads.folded import FoldedHead
from vocabfold.heads.kernels import sum_dtype
from vocabfold.heads.linear import SortedLinearScorer
from vocabfold.heads.partition import Partition

ROWS_A_TIME = 4096  # hidden states whose logits in one group are held together


class RescoredHead(FoldedHead):
    """FoldedHead with one linear layer a group and the groups' scores s(h) above.

    ``width`` of U [width, D], which starts as torch's own layers do, and V [M, width], which starts as 0; 0: neither.
    ``visited``: how many of the M groups of more than one token are scored exactly. With neither this is FoldedHead
    with a bias. Raises UserError for a negative width or more visited groups than there are.
    """

    def __init__(
        self, hidden_size: int, partition: Partition, scorer: SortedLinearScorer, width: int = 0, visited: int = 0
    ) -> None:
        super().__init__(hidden_size, partition, scorer, with_bias=True)
        num_multi = len(partition.multi_groups)
        if width < 0:
            raise UserError(f"the width of the groups' scorer is {width}: choose 0 (a linear one) or more")
        if not 0 <= visited <= num_multi:
            raise UserError(f"{visited} visited groups: choose from 0 to {num_multi}, those of more than one token")
        self.linear_scorer = [scorer]  # in a list, so that the weights are not registered twice
        self.width, self.visited = width, visited
        self.into = nn.Linear(hidden_size, width) if width else None
        self.out = nn.Parameter(torch.zeros(num_multi, width)) if width else None

    def scores(self, hidden: Tensor) -> Tensor:
        """s(h), ``hidden`` [N, D] -> [N, G], without a visit."""
        logits = super()._group_logits(hidden)
        if self.into is None or self.out is None:
            return logits
        inner = F.gelu(self.into(F.layer_norm(hidden, hidden.shape[-1:])))
        return logits.index_add(-1, self.partition.multi_groups, F.linear(inner, self.out).to(logits.dtype))

    def exact_scores(self, hidden: Tensor, index: Tensor) -> Tensor:
        """z [N, K] of groups ``index`` [N, K], places among the M of more than one token, for ``hidden`` [N, D].

        One product for each group that anyone asks for, with its rows where they lie.
        """
        asked, order = index.flatten().sort()
        rows = hidden[order // max(1, index.shape[1])]
        groups, numbers = asked.unique_consecutive(return_counts=True)
        sums = [
            F.linear(some, *self._layer(group)).to(sum_dtype(hidden.dtype)).logsumexp(dim=-1)
            for group, some in zip(groups.tolist(), rows.split(numbers.tolist()), strict=True)
        ]
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return torch.cat(sums)[place].view_as(index) if sums else hidden.new_zeros(index.shape)

    @torch.no_grad()
    def teacher_scores(self, hidden: Tensor) -> Tensor:
        """z of the M groups of more than one token, ``hidden`` [N, D] -> [N, M]: what s is to learn."""
        result = hidden.new_empty(len(hidden), len(self.partition.multi_groups), dtype=sum_dtype(hidden.dtype))
        for index in range(result.shape[1]):
            layer = self._layer(index)
            for some, scores in zip(hidden.split(ROWS_A_TIME), result.split(ROWS_A_TIME), strict=True):
                scores[:, index] = F.linear(some, *layer).to(result.dtype).logsumexp(dim=-1)
        return result

    def _layer(self, index: int) -> tuple[Tensor, Tensor]:
        scorer, partition = self.linear_scorer[0], self.partition
        start, stop = partition.multi_bounds[index : index + 2]
        rows = scorer.weight[partition.multi_tokens[start:stop]] if scorer.tied else scorer.weight[start:stop]
        return rows, scorer.bias[start:stop]

    def _group_logits(self, hidden: Tensor) -> Tensor:
        logits = self.scores(hidden)
        if not self.visited:
            return logits
        multi = self.partition.multi_groups
        index = logits.detach()[:, multi].topk(self.visited, dim=-1).indices
        return self.with_visits(logits, index, self.exact_scores(hidden, index))

    def with_visits(self, scores: Tensor, index: Tensor, exact: Tensor) -> Tensor:
        """``scores`` [N, G] with ``exact`` [N, K], z of groups ``index`` [N, K], in the place of theirs, those of the
        other groups of more than one token moved as the module says."""
        scores = scores.to(exact.dtype)
        if not index.shape[1]:
            return scores
        multi = self.partition.multi_groups
        visited = multi[index]
        shift = exact.logsumexp(-1, keepdim=True) - scores.gather(-1, visited).logsumexp(-1, keepdim=True)
        return scores.index_add(-1, multi, shift.expand(-1, len(multi))).scatter(-1, visited, exact)

    @property
    def _is_plain(self) -> bool:
        return not self.width and not self.visited

    def _group_total(
        self, hidden: Tensor, groups: Tensor, counted: Tensor, with_hits: bool
    ) -> tuple[Tensor, Tensor | None]:
        if self._is_plain:
            return super()._group_total(hidden, groups, counted, with_hits)
        log_prob = self.group_log_prob(hidden)
        chosen = log_prob.gather(-1, groups.unsqueeze(-1)).squeeze(-1)
        hits = ((log_prob.detach().argmax(dim=-1) == groups) & counted).sum() if with_hits else None
        return torch.where(counted, chosen, 0.0).sum(), hits

    def _each_group_log_prob(self, hidden: Tensor, groups: Tensor, counted: Tensor) -> Tensor:
        if self._is_plain:
            return super()._each_group_log_prob(hidden, groups, counted)
        return self.group_log_prob(hidden).gather(-1, groups.unsqueeze(-1)).squeeze(-1)

    def _log_prob_and_normalisers(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self._is_plain:
            return super()._log_prob_and_normalisers(hidden, targets)
        counted, _ = counted_targets(targets)
        groups, slots = self._group_and_slot(targets, counted)
        logits = self._group_logits(hidden)
        normaliser = logits.logsumexp(dim=-1)
        group_log_prob = logits.gather(-1, groups.unsqueeze(-1)).squeeze(-1) - normaliser
        token_log_prob = self.scorer.target_log_prob(hidden, groups, slots)
        token_logit = self.scorer.target_logit(hidden, groups, slots)
        return group_log_prob + token_log_prob, [normaliser, token_logit - token_log_prob]

    @property
    def rows_a_token(self) -> float:
        """How many rows of D numbers are read to score the groups and then one group's tokens, a mean over tokens that
        are all equally likely to need any group of more than one token; a visited group is not read again."""
        multi = self.partition.multi_groups
        mean_size = float(self.partition.sizes[multi].double().mean()) if len(multi) else 0.0
        scorer = self.width + len(multi) * self.width / self.hidden_size
        return self.partition.num_groups + scorer + mean_size * max(1, self.visited)


def rows_of(head: RescoredHead) -> list[Tensor]:
    """What the full softmax has in common with ``head``: the tokens' rows and biases, [..., D] and [...]."""
    assert head.group_bias is not None
    scorer, singles = head.linear_scorer[0], head.partition.single_groups
    return [scorer.weight, scorer.bias, head.group_weight[singles], head.group_bias[singles]]
