"""The folded softmax P(v|h) = P(g|h) P(t|g, h): first the group, then the token within it (arXiv 2411.06371).

L = CrossEntropy(W_group h, g) + CrossEntropy(token scores of the true group g, t) is the exact negative log
likelihood of that distribution; nothing is approximated in training, and nothing of size N x V is ever built.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.heads.base import Head, HeadLoss, counted_targets, log_softmax, mean_over_targets
from vocabfold.heads.partition import Partition
from vocabfold.heads.scorers import TokenScorer

GROUPS_A_VISIT = 8  # how many more groups of each row topk looks into at a time


class FoldedHead(Head):
    """A group scorer W_group [G, D] and a token scorer on a partition of the vocabulary.

    W_group starts as normal(0, ``init_std``).
    """

    def __init__(self, hidden_size: int, partition: Partition, scorer: TokenScorer, init_std: float = 0.02) -> None:
        super().__init__(hidden_size, partition.vocabulary_size)
        self.partition = partition
        self.scorer = scorer
        self.group_weight = nn.Parameter(torch.empty(partition.num_groups, hidden_size))
        nn.init.normal_(self.group_weight, std=init_std)

    def group_log_prob(self, hidden: Tensor) -> Tensor:
        """``hidden`` [N, D] -> log P(g | h) [N, G] in nats."""
        return log_softmax(F.linear(hidden, self.group_weight))

    def _group_and_slot(self, targets: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        tokens = targets.masked_fill(~counted, 0)  # an ignored target takes any token's place; it never counts
        # index_select refuses a negative token that indexing would wrap around to the end of the vocabulary.
        return self.partition.group_of.index_select(0, tokens), self.partition.slot_of.index_select(0, tokens)

    def loss(self, hidden: Tensor, targets: Tensor, with_accuracy: bool = False) -> HeadLoss:
        """See Head.loss. Parts: ``group_loss``, ``token_loss``; where asked for ``group_accuracy`` (the likeliest
        group is the target's) and ``token_accuracy`` (the likeliest slot of the target's own group is the target's)."""
        counted, num_targets = counted_targets(targets)
        groups, slots = self._group_and_slot(targets, counted)
        group_logits = F.linear(hidden, self.group_weight)
        group_loss = mean_over_targets(-F.cross_entropy(group_logits, groups, reduction="none"), counted, num_targets)
        parts = {}
        if with_accuracy:
            slot_log_prob = self.scorer.group_log_prob(hidden, groups.unsqueeze(-1)).squeeze(1)
            token_log_prob = slot_log_prob.gather(-1, slots.unsqueeze(-1)).squeeze(-1)
            group_hits = (group_logits.detach().argmax(dim=-1) == groups) & counted
            token_hits = (slot_log_prob.detach().argmax(dim=-1) == slots) & counted
            parts["group_accuracy"] = group_hits.sum() / num_targets.clamp(min=1)
            parts["token_accuracy"] = token_hits.sum() / num_targets.clamp(min=1)
        else:
            token_log_prob = self.scorer.target_log_prob(hidden, groups, slots)
        token_loss = mean_over_targets(token_log_prob, counted, num_targets)
        parts |= {"group_loss": group_loss.detach(), "token_loss": token_loss.detach()}
        return HeadLoss(group_loss + token_loss, num_targets, parts)

    def target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See Head.target_log_prob."""
        counted, _ = counted_targets(targets)
        groups, slots = self._group_and_slot(targets, counted)
        group_log_prob = -F.cross_entropy(F.linear(hidden, self.group_weight), groups, reduction="none")
        return torch.where(counted, group_log_prob + self.scorer.target_log_prob(hidden, groups, slots), 0.0)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """See Head.log_prob."""
        by_position = self.scorer.position_log_prob(hidden)
        group_at = self.partition.group_of[self.partition.order]
        by_position = by_position + self.group_log_prob(hidden)[:, group_at]
        return by_position[:, self.partition.position_of]

    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See Head.topk. Exact without [N, V]: groups are visited from the likeliest down, and since
        P(v) = P(g) P(t|g) <= P(g), no token of an unvisited group can enter once P of the next group is below the
        k-th best token found so far. A row that needs no further group is left alone."""
        self.check_k(k)
        group_log_prob, group = self.group_log_prob(hidden).sort(dim=-1, descending=True)
        best = hidden.new_full((len(hidden), k), -torch.inf, dtype=group_log_prob.dtype)
        tokens = torch.zeros(best.shape, dtype=torch.int64, device=hidden.device)
        for start in range(0, self.partition.num_groups, GROUPS_A_VISIT):
            rows = (group_log_prob[:, start] > best[:, -1]).nonzero().squeeze(-1)
            if len(rows) == 0:
                break
            visited = group[rows, start : start + GROUPS_A_VISIT]
            log_prob = self.scorer.group_log_prob(hidden[rows], visited).to(best.dtype)
            log_prob = log_prob + group_log_prob[rows, start : start + GROUPS_A_VISIT].unsqueeze(-1)
            candidates = torch.cat([best[rows], log_prob.flatten(1)], dim=-1)
            best[rows], chosen = candidates.topk(k, dim=-1)
            tokens[rows] = self._tokens_of(chosen, tokens[rows], visited)
        return best, tokens

    def _tokens_of(self, chosen: Tensor, kept: Tensor, visited: Tensor) -> Tensor:
        """Token ids of the columns ``chosen`` [R, k] of (kept [R, k] | slots of the groups visited [R, M] x S)."""
        k, num_slots = kept.shape[-1], self.partition.num_slots
        beyond = (chosen - k).clamp(min=0)
        groups = visited.gather(-1, beyond // num_slots)
        # A slot without a token may be chosen only while fewer than k real ones were seen; it has -inf and is replaced.
        slots = torch.minimum(beyond % num_slots, self.partition.sizes[groups] - 1)
        return torch.where(chosen < k, kept.gather(-1, chosen.clamp(max=k - 1)), self.partition.token_at(groups, slots))

    @torch.no_grad()
    def sample(
        self,
        hidden: Tensor,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See Head.sample. At temperature 1 without cuts: draw the group, then the token, O(D (G + S)) a row;
        with ``top_k`` through ``topk``; otherwise through the whole distribution."""
        self.check_sampling(temperature, top_k, top_p)
        if temperature != 1.0 or top_k is not None or top_p is not None:
            return super().sample(hidden, temperature, top_k, top_p, generator)
        group = torch.multinomial(self.group_log_prob(hidden).exp(), 1, generator=generator)
        slot_probability = self.scorer.group_log_prob(hidden, group).squeeze(1).exp()
        slot = torch.multinomial(slot_probability, 1, generator=generator)
        return self.partition.token_at(group, slot).squeeze(-1)
