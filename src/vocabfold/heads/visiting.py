"""The best tokens and samples of a folded head without [N, V]: groups are visited from the likeliest down.

Written with p(v) = P(g) p(v|g) and a = 1 / temperature, the tempered weight of a token is w(v) = (p(v) / p_best)^a and
that of a group M(g) = sum of w over its n tokens. Before a group is visited, all that is known is P(g), which bounds

    w(v) <= min(1, (P / p_best)^a)                        p(v) <= P(g) and p(v) <= p_best
    a <= 1:  (P/p_best)^a <= M <= n (P / (n p_best))^a    x^a is concave with 0^a = 0: subadditive; Jensen's inequality
    a >= 1:  n (P / (n p_best))^a <= M <= (P/p_best)^a    x^a is convex with 0^a = 0: Jensen's inequality; superadditive
    M <= n and, for a >= 1, M <= P / p_best               w <= 1, and then w <= p / p_best

At a = 1 both ends are P(g) / p_best; there p_best cancels, and 1 stands in for it. A group of one token is known
without a visit: both ends are its weight.
All weights are held as logarithms in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vocabfold.heads.partition import Partition
from vocabfold.heads.sampling import within_nucleus
from vocabfold.heads.scorers import TokenScorer

GROUPS_A_VISIT = 8  # how many more groups of each row are looked into at first; twice as many each time after,
VISITED_ELEMENTS = 1 << 18  # as long as the log-probabilities of all rows' groups stay within this
PAIRS_A_VISIT = 32  # of a row and a group: a visit of a few rows for a nucleus takes more groups at once
# tokens of all rows that may be held at once where rows are looked at as a whole; a GPU wants larger pieces
WHOLE_ROWS_ELEMENTS, WHOLE_ROWS_ELEMENTS_ON_GPU = 1 << 20, 1 << 24
WHOLE_ROWS_SHARE = 0.25  # of all groups: a row that may need more than this after its first visit is taken as a whole


def topk_by_visits(
    partition: Partition, scorer: TokenScorer, hidden: Tensor, group_log_prob: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """(log P [N, k], token [N, k]), best first. Exact: p(v) <= P(g), so no token of an unvisited group can enter once
    P of the next group is below the k-th best token found so far. A row that needs no further group is left alone.

    How many groups are still above the k-th best says after the first visit whether a row is flat: such rows are
    computed as a whole, at most WHOLE_ROWS_ELEMENTS tokens at a time, which is faster than to visit nearly all.
    """
    best = hidden.new_full((len(hidden), k), -torch.inf, dtype=group_log_prob.dtype)
    tokens = torch.zeros(best.shape, dtype=torch.int64, device=hidden.device)
    if partition.has_single_groups:
        singles = partition.single_groups
        found = group_log_prob[:, singles].topk(min(k, len(singles)), dim=-1)
        best[:, : found.values.shape[1]] = found.values
        tokens[:, : found.values.shape[1]] = partition.order[partition.boundaries[singles]][found.indices]
        ranked_log_prob, order = group_log_prob[:, partition.multi_groups].sort(dim=-1, descending=True)
    else:
        ranked_log_prob, order = group_log_prob.sort(dim=-1, descending=True)
    # As long as all rows are visited nothing of them is copied: for a few rows that takes longer than the products.
    rows: Tensor | slice = slice(None)
    numbers = torch.arange(len(hidden), device=hidden.device)
    start, width = 0, GROUPS_A_VISIT
    while start < order.shape[1]:
        if start > 0 or partition.has_single_groups:
            needed = (ranked_log_prob[rows, start:] > best[rows, -1:]).sum(dim=-1)
            is_flat = needed > WHOLE_ROWS_SHARE * order.shape[1]
            if start > 0 and is_flat.any():
                flat = numbers[is_flat]
                best[flat], tokens[flat] = _topk_of_whole_rows(partition, scorer, hidden[flat], group_log_prob[flat], k)
                needed = needed.masked_fill(is_flat, 0)
            rows = numbers = numbers[needed > 0]
        if len(numbers) == 0:
            break
        visited = order[rows, start : start + width]
        if partition.has_single_groups:
            visited = partition.multi_groups[visited]
        log_prob = scorer.group_log_prob(hidden[rows], visited).to(best.dtype)
        log_prob = log_prob + ranked_log_prob[rows, start : start + width].unsqueeze(-1)
        best_of_rows, chosen = torch.cat([best[rows], log_prob.flatten(1)], dim=-1).topk(k, dim=-1)
        best[rows], place = best_of_rows, (chosen - k).clamp(min=0)
        found_tokens = _tokens_at(partition, visited.gather(-1, place // partition.num_slots), place)
        tokens[rows] = torch.where(chosen < k, tokens[rows].gather(-1, chosen.clamp(max=k - 1)), found_tokens)
        start, width = start + width, _wider(width, len(numbers), partition)
    return best, tokens


def _topk_of_whole_rows(
    partition: Partition, scorer: TokenScorer, hidden: Tensor, group_log_prob: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    best = group_log_prob.new_empty(len(hidden), k)
    tokens = torch.empty(best.shape, dtype=torch.int64, device=hidden.device)
    group_at = partition.group_of[partition.order]
    for part in _whole_rows(len(hidden), hidden, partition):
        log_prob = scorer.position_log_prob(hidden[part]) + group_log_prob[part].index_select(1, group_at)
        best[part], places = log_prob.topk(k, dim=-1)
        tokens[part] = partition.order[places]
    return best, tokens


def _whole_rows(number: int, hidden: Tensor, partition: Partition) -> Iterator[slice]:
    """Slices of ``number`` rows of which all tokens may be held at once."""
    most = WHOLE_ROWS_ELEMENTS_ON_GPU if hidden.is_cuda else WHOLE_ROWS_ELEMENTS
    step = max(1, most // partition.vocabulary_size)
    return (slice(start, start + step) for start in range(0, number, step))


def _tokens_at(partition: Partition, groups: Tensor, places: Tensor) -> Tensor:
    """The tokens in the slots ``places`` mod S of ``groups``; a slot without a token repeats the group's last."""
    return partition.token_at(groups, torch.minimum(places % partition.num_slots, partition.sizes.take(groups) - 1))


def _wider(width: int, num_rows: int, partition: Partition) -> int:
    most = VISITED_ELEMENTS // max(1, num_rows * partition.num_slots)
    return max(GROUPS_A_VISIT, min(2 * width, most))


def log_sum(log_weights: Tensor) -> Tensor:
    """log of the sum over the last dimension, -inf where all are or there is none."""
    return log_weights.logsumexp(dim=-1) if log_weights.shape[-1] else log_weights.sum(dim=-1) - torch.inf


@dataclass
class TemperedGroups:
    """Some rows' distribution at a temperature, known by group only: log P(g) - log p_best [N, G], float64."""

    partition: Partition
    scorer: TokenScorer
    hidden: Tensor
    log_ratio: Tensor
    temperature: float

    def select(self, rows: Tensor) -> TemperedGroups:
        """The same of some rows."""
        return TemperedGroups(self.partition, self.scorer, self.hidden[rows], self.log_ratio[rows], self.temperature)

    def visit(self, groups: Tensor) -> Tensor:
        """``groups`` [N, K] -> log w [N, K, S] of their tokens, -inf where a slot has none."""
        log_prob = self.scorer.group_log_prob(self.hidden, groups).double()
        ratio = log_prob + self.log_ratio.gather(-1, groups).unsqueeze(-1)
        return self._tempered(ratio).clamp(max=0.0)

    def whole(self) -> Tensor:
        """log w of every token, by its id: [N, V], in the scorer's own precision."""
        log_prob = self.scorer.position_log_prob(self.hidden).index_select(1, self.partition.position_of)
        log_prob += self.log_ratio.to(log_prob.dtype).index_select(1, self.partition.group_of)
        return self._tempered(log_prob).clamp_(max=0.0)

    def token_bound(self) -> Tensor:
        """At least log w of any token of each group, [N, G]."""
        return self._tempered(self.log_ratio).clamp(max=0.0)

    def mass_bounds(self) -> tuple[Tensor, Tensor]:
        """(at least, at most) log M of each group, [N, G] each; see the module's first lines."""
        if self.temperature == 1.0:
            return self.log_ratio, self.log_ratio
        log_sizes = self.partition.sizes.double().log()
        together = self._tempered(self.log_ratio)
        spread = log_sizes + self._tempered(self.log_ratio - log_sizes)
        if self.temperature > 1.0:
            return together, torch.minimum(spread, log_sizes)
        return spread, torch.minimum(torch.minimum(together, self.log_ratio), log_sizes)

    def _tempered(self, log_ratio: Tensor) -> Tensor:
        if self.temperature == 1.0:
            return log_ratio
        # At an infinite temperature too an impossible token stays impossible.
        return torch.where(log_ratio == -torch.inf, log_ratio, log_ratio / self.temperature)

    def ranked(self) -> Tensor:
        """The groups of more than one token, the likeliest of each row first: [N, M]."""
        if not self.partition.has_single_groups:
            return self.log_ratio.argsort(dim=-1, descending=True)
        multi_groups = self.partition.multi_groups
        return multi_groups[self.log_ratio[:, multi_groups].argsort(dim=-1, descending=True)]

    def singles(self) -> tuple[Tensor, Tensor, Tensor]:
        """The groups of one token [K], these tokens [K] and their log w [N, K], for which no visit is needed."""
        groups = self.partition.single_groups
        tokens = self.partition.order[self.partition.boundaries[groups]]
        return groups, tokens, self._tempered(self.log_ratio[:, groups]).clamp(max=0.0)


def draw(groups: TemperedGroups, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A token of each row from the tempered distribution, and its log w: ([N], [N]).

    Exact by rejection: a group is drawn by the upper bounds of its mass, visited, and kept with probability
    M / bound; if it is not, its bound becomes M and the row draws again. Whatever was learned before, a trial ends with
    group g with probability (bound / total) (M / bound) = M(g) / total, in proportion to M, and a visited group is
    always kept, so that G + 1 trials are enough.
    """
    partition, device = groups.partition, groups.hidden.device
    tokens = torch.zeros(len(groups.hidden), dtype=torch.int64, device=device)
    log_weights = torch.zeros(len(tokens), dtype=torch.float64, device=device)
    bounds = groups.mass_bounds()[1]
    is_visited = torch.zeros_like(bounds, dtype=torch.bool)
    rows = torch.arange(len(tokens), device=device)
    while len(rows) > 0:
        group = torch.multinomial(bounds.softmax(dim=-1), 1, generator=generator)
        weights = groups.visit(group).squeeze(1)
        mass = log_sum(weights).unsqueeze(-1)
        chance = (mass - bounds.gather(-1, group)).exp()
        is_kept = torch.rand(chance.shape, generator=generator, dtype=chance.dtype, device=device) < chance
        is_kept |= is_visited.gather(-1, group)
        slot = torch.multinomial(weights.softmax(dim=-1), 1, generator=generator)
        # A row that is not kept is written again by a later trial.
        tokens[rows] = partition.token_at(group, slot).squeeze(-1)
        log_weights[rows] = weights.gather(-1, slot).squeeze(-1)
        again = (~is_kept).nonzero()[:, 0]
        if len(again) > 0:
            bounds = bounds.scatter(-1, group, mass)[again]
            is_visited = is_visited.scatter(-1, group, True)[again]
            groups = groups.select(again)
        rows = rows[again]
    return tokens, log_weights


def cut_to_nucleus(
    groups: TemperedGroups, tokens: Tensor, log_weights: Tensor, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """Each row's drawn token [N] if it is among the likeliest that hold ``top_p`` of the mass, else a draw from those.

    A token v of a nucleus of mass m then comes with p(v) + (1 - m) p(v) / m = p(v) / m. Rows for which a few visits do
    not settle it are looked at as a whole, at most WHOLE_ROWS_ELEMENTS tokens at a time.
    """
    tokens = tokens.clone()
    left = (~is_surely_in_nucleus(groups, tokens, log_weights, top_p)).nonzero().squeeze(-1)
    for part in _whole_rows(len(left), groups.hidden, groups.partition):
        rows = left[part]
        probability = groups.select(rows).whole().softmax(dim=-1)
        tokens[rows] = within_nucleus(probability, tokens[rows], top_p, generator)
    return tokens


def is_surely_in_nucleus(groups: TemperedGroups, tokens: Tensor, log_weights: Tensor, top_p: float) -> Tensor:
    """Of each row's token [N] whether a few visits show that it belongs to the nucleus: [N] bool.

    It does if the tokens before it (likelier, or as likely with a smaller id) hold less than top_p Z, Z the sum of all
    M. Unvisited groups put both between bounds: a group whose token bound is below the token's own weight has nothing
    before it, any other at most its M. A row is left as soon as the bounds decide, or once so many groups may hold
    something before the token that the row had better be taken as a whole.
    """
    partition = groups.partition
    result = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    own = torch.stack([tokens, partition.group_of[tokens], partition.slot_of[tokens]], dim=-1)
    own_weight = log_weights.unsqueeze(-1)
    # Not as logarithms: no M is above n, and Z is no less than about 1, so that what underflows does not matter.
    low, high = (bound.exp() for bound in groups.mass_bounds())
    before_low = torch.zeros_like(low)
    may_be_before = groups.token_bound() >= own_weight
    before_high = high.where(may_be_before, 0.0)
    singles, ids, weights = groups.singles()
    if len(singles) > 0:
        is_before = (weights > own_weight) | ((weights == own_weight) & (ids < own[:, :1]))
        is_before &= ids != own[:, :1]
        before_low[:, singles] = before_high[:, singles] = weights.exp() * is_before
    ranked = groups.ranked()
    wanted = may_be_before[:, partition.multi_groups].sum(dim=-1)
    rows = torch.arange(len(tokens), device=tokens.device)
    start, width = 0, max(GROUPS_A_VISIT, PAIRS_A_VISIT // max(1, len(rows)))
    while True:
        inside = before_high.sum(dim=-1) < top_p * low.sum(dim=-1)
        outside = before_low.sum(dim=-1) >= top_p * high.sum(dim=-1)
        result[rows] = inside
        undecided = ~(inside | outside)
        if start > 0:
            undecided &= wanted[rows] - start <= WHOLE_ROWS_SHARE * ranked.shape[1]
        undecided = undecided.nonzero().squeeze(-1)
        if len(undecided) == 0 or start >= ranked.shape[1]:
            return result
        if len(undecided) < len(rows):
            groups, rows, ranked, own = groups.select(undecided), rows[undecided], ranked[undecided], own[undecided]
            own_weight, low, high = own_weight[undecided], low[undecided], high[undecided]
            before_low, before_high = before_low[undecided], before_high[undecided]
        visited = ranked[:, start : start + width]
        weights = groups.visit(visited)
        is_before = weights > own_weight.unsqueeze(-1)
        # As likely, with a smaller id: few tokens, so that only theirs are looked up.
        row, column, slot = (weights == own_weight.unsqueeze(-1)).nonzero(as_tuple=True)
        is_before[row, column, slot] = partition.token_at(visited[row, column], slot) < own[row, 0]
        # Rounding cannot put a token before itself.
        row, column = (visited == own[:, 1:2]).nonzero(as_tuple=True)
        is_before[row, column, own[row, 2]] = False
        weights = weights.exp()
        mass, before = weights.sum(dim=-1), (weights * is_before).sum(dim=-1)
        for table, value in ((low, mass), (high, mass), (before_low, before), (before_high, before)):
            table.scatter_(-1, visited, value)
        start, width = start + width, _wider(width, len(rows), partition)
