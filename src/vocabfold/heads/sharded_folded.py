"""A folded head whose groups are spread over processes: each holds the rows of its own groups and nobody all of them.

Every process has hidden states of its own. The softmax over the groups is small, and everybody has it; then a hidden
state goes to the one process that holds its target's group, as tokens go to experts (arXiv 2006.16668), and its
log-probability comes back. A full softmax has no such process: there all go everywhere (sharded.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.errors import UserError
from vocabfold.heads.base import Head
from vocabfold.heads.collectives import Group, gather, on_every_rank, routed, topk_of_all
from vocabfold.heads.conditioned import ConditionedLinearScorer
from vocabfold.heads.folded import FoldedHead
from vocabfold.heads.kernels import product_dtype, sum_dtype
from vocabfold.heads.linear import LoopedLinearScorer
from vocabfold.heads.partition import Partition
from vocabfold.heads.scorers import TokenScorer


def owners_of_groups(partition: Partition, num_ranks: int, counts: Tensor | None = None) -> Tensor:
    """The process that holds each group [G].

    The groups with the most tokens of a text (``counts`` [V]; without them, with the most rows) are given out first,
    each to the process with the least so far among those that have room for a group: they differ by one group at most.
    """
    weights = torch.ones(partition.vocabulary_size) if counts is None else counts.cpu().double()
    load = torch.zeros(partition.num_groups, dtype=torch.float64)
    load.index_add_(0, partition.group_of.cpu(), weights.double())
    owners = torch.zeros(partition.num_groups, dtype=torch.int64)
    # Groups of one token have no rows here, only a place in a search for the likeliest tokens.
    for groups in (partition.multi_groups.cpu(), partition.single_groups.cpu()):
        loads, numbers = [0.0] * num_ranks, [0] * num_ranks
        for group in groups[load[groups].argsort(descending=True, stable=True)].tolist():
            fewest = min(numbers)
            free = [rank for rank in range(num_ranks) if numbers[rank] == fewest]
            rank = min(free, key=loads.__getitem__)
            owners[group] = rank
            loads[rank] += float(load[group])
            numbers[rank] += 1
    return owners


class RoutedScorer(TokenScorer):
    """The token scorer of a partition of which this process holds the groups whose ``owners`` [G] is its rank.

    ``local`` is the part of ``whole`` for those groups, on a vocabulary of their tokens alone; None where there are
    none. Its rows are copies: a head that borrowed the embedding's no longer does.
    """

    owners: Tensor

    def __init__(self, whole: LoopedLinearScorer, owners: Tensor, group: Group = None) -> None:
        partition = whole.partition
        super().__init__(partition)
        self.gradients_in_forward, self.softcap = whole.gradients_in_forward, whole.softcap
        self._make, self._of_tokens, self._of_groups = whole.maker(), whole.of_tokens, whole.of_groups
        self.group, self.rank, self.num_ranks = group, dist.get_rank(group), dist.get_world_size(group)
        owners = owners.to(partition.order.device)
        place_at_owner = torch.empty_like(partition.order)
        self.num_tokens = []
        for rank in range(self.num_ranks):
            positions = self._positions(owners, rank)
            place_at_owner[positions] = torch.arange(len(positions), device=positions.device)
            self.num_tokens.append(len(positions))
        self.register_buffer("owners", owners)
        self.register_buffer("place_at_owner", place_at_owner, persistent=False)  # [V], by position
        own = self._positions(owners, self.rank)
        self.register_buffer("own_tokens", partition.order[own], persistent=False)
        self.local: LoopedLinearScorer | None = None
        if len(own) > 0:
            sizes = partition.sizes[owners == self.rank]
            bounds = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
            local = Partition(torch.arange(len(own), device=own.device), bounds)
            scorer = self._make(local).to(whole.weight)
            with torch.no_grad():
                for name, target in scorer.named_parameters():
                    rows = self._rows_of(name, owners, self.rank)
                    if name == "weight" and whole.tied:
                        rows = partition.multi_tokens[rows]
                    target.copy_(whole.get_parameter(name)[rows])
            scorer.softcap = whole.softcap
            self.local = scorer

    place_at_owner: Tensor  # of each position, among its owner's tokens
    own_tokens: Tensor  # of this process, in the order of their positions
    num_tokens: list[int]  # of each process

    def _positions(self, owners: Tensor, rank: int) -> Tensor:
        partition = self.partition
        return (owners[partition.group_of[partition.order]] == rank).nonzero().squeeze(-1)

    def _rows_of(self, parameter: str, owners: Tensor, rank: int) -> Tensor | slice:
        """Where a process's rows of a ``parameter`` stand among those of the unsharded scorer: all, of one that has no
        rows for tokens or groups."""
        if parameter in self._of_tokens:
            groups = self.partition.group_of[self.partition.multi_tokens]
        elif parameter in self._of_groups:
            groups = self.partition.multi_groups
        else:
            return slice(None)
        return (owners[groups] == rank).nonzero().squeeze(-1)

    def replicated_parameters(self) -> list[nn.Parameter]:
        """Those that every process with a group has whole."""
        split = self._of_tokens + self._of_groups
        named = [] if self.local is None else self.local.named_parameters()
        return [parameter for name, parameter in named if name not in split]

    def start_from(self, log_frequency: Tensor) -> None:
        """See TokenScorer.start_from."""
        if self.local is not None:
            self.local.start_from(log_frequency[self.own_tokens])

    def _routed(
        self,
        hidden: Tensor,
        groups: Tensor,
        slots: Tensor,
        kept: Tensor,
        compute: Callable[[TokenScorer, Tensor, Tensor, Tensor], Tensor],
        num_columns: int,
    ) -> Tensor:
        """What ``compute`` (the local scorer, hidden states, groups and slots there -> [M, columns]) makes of the rows
        ``kept`` [N] where their groups are, [N, columns]; 0 for the others, and for groups of one token."""
        rows = (kept & (self.partition.sizes[groups] > 1)).nonzero().squeeze(-1)
        groups, slots = groups[rows], slots[rows]
        places = self.place_at_owner[self.partition.boundaries[groups] + slots]

        def there(hidden: Tensor, places: Tensor) -> Tensor:
            if self.local is None:
                return hidden.new_zeros(len(hidden), num_columns, dtype=sum_dtype(hidden.dtype))  # no row comes here
            local = self.local.partition
            found = compute(self.local, hidden, local.group_of[places], local.slot_of[places])
            if torch.is_grad_enabled() and len(hidden) == 0:  # no row came: gradients are 0, not missing
                found = found + sum(tensor[:0].sum() for tensor in (hidden, *self.local.parameters()))
            return found.to(sum_dtype(hidden.dtype))

        found = routed(hidden[rows].to(product_dtype(hidden)), places, self.owners[groups], there, self.group)
        return found.new_zeros(len(hidden), num_columns).index_copy(0, rows, found)

    def total_log_prob(
        self, hidden: Tensor, groups: Tensor, slots: Tensor, counted: Tensor, with_hits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See TokenScorer.total_log_prob."""

        def compute(local: TokenScorer, hidden: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
            log_prob = local.target_log_prob(hidden, groups, slots)
            if not with_hits:
                return log_prob.unsqueeze(-1)
            with torch.no_grad():
                likeliest = local.group_log_prob(hidden, groups.unsqueeze(-1)).squeeze(1).argmax(dim=-1)
            return torch.stack([log_prob, (likeliest == slots).to(log_prob.dtype)], dim=-1)

        found = self._routed(hidden, groups, slots, counted, compute, 1 + with_hits)
        if not with_hits:
            return found.sum(), None
        certain = counted & (self.partition.sizes[groups] == 1)
        return found[:, 0].sum(), found[:, 1].detach().sum().long() + certain.sum()

    def target_log_prob(self, hidden: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
        """See TokenScorer.target_log_prob."""

        def compute(local: TokenScorer, hidden: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
            return local.target_log_prob(hidden, groups, slots).unsqueeze(-1)

        return self._routed(hidden, groups, slots, torch.ones_like(groups, dtype=torch.bool), compute, 1).squeeze(-1)

    def _target_logit(self, hidden: Tensor, index: Tensor, slots: Tensor) -> Tensor:
        def compute(local: TokenScorer, hidden: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
            assert isinstance(local, LoopedLinearScorer)
            seen = local.condition(hidden, groups)
            return local._target_logit(seen, local.partition.index_of(groups), slots).unsqueeze(-1)

        groups = self.partition.multi_groups[index]
        return self._routed(hidden, groups, slots, torch.ones_like(index, dtype=torch.bool), compute, 1).squeeze(-1)

    def _slot_log_prob(self, hidden: Tensor, index: Tensor) -> Tensor:
        num_slots = self.partition.num_slots

        def compute(local: TokenScorer, hidden: Tensor, groups: Tensor, _: Tensor) -> Tensor:
            found = local.group_log_prob(hidden, groups.unsqueeze(-1)).squeeze(1)
            return F.pad(found, (0, num_slots - found.shape[1]), value=-torch.inf)

        groups = self.partition.multi_groups[index].flatten()
        each = hidden.repeat_interleave(index.shape[1], dim=0)
        every = torch.ones_like(groups, dtype=torch.bool)
        found = self._routed(each, groups, torch.zeros_like(groups), every, compute, num_slots)
        return found.view(*index.shape, num_slots)

    def _all_log_prob(self, hidden: Tensor) -> Tensor:
        return self.position_log_prob(hidden)[:, self.partition.multi_positions]

    def position_log_prob(self, hidden: Tensor) -> Tensor:
        """See TokenScorer.position_log_prob."""
        width = max(self.num_tokens)

        def compute(rows: Tensor) -> tuple[Tensor]:
            if self.local is None:
                return (rows.new_zeros(len(rows), width, dtype=sum_dtype(rows.dtype)),)
            found = self.local.position_log_prob(rows).to(sum_dtype(rows.dtype))
            return (F.pad(found, (0, width - found.shape[1])),)

        (found,) = on_every_rank(hidden, compute, self.group)
        parts = [found[rank, :, :number] for rank, number in enumerate(self.num_tokens)]
        positions = [self._positions(self.owners, rank) for rank in range(self.num_ranks)]
        return torch.cat(parts, dim=1)[:, torch.cat(positions).argsort()]

    def unsharded(self, like: Tensor) -> LoopedLinearScorer:
        """The scorer with the rows of all processes, in each of them; ``like`` [.., D] has their dtype and device."""
        whole = self._make(self.partition).to(like)
        whole.softcap = self.softcap
        with torch.no_grad():
            for name, target in whole.named_parameters():
                own = target[:0] if self.local is None else self.local.get_parameter(name).detach()
                places = torch.arange(len(target), device=target.device)
                rows = [places[self._rows_of(name, self.owners, rank)] for rank in range(self.num_ranks)]
                most = max(1, *map(len, rows))
                every = gather(own, most, self.group).unflatten(0, (self.num_ranks, most))
                for rank in reversed(range(self.num_ranks)):  # of what all have the first's, which never lacks it
                    target[rows[rank]] = every[rank, : len(rows[rank])]
        return whole


class ShardedFoldedHead(FoldedHead):
    """FoldedHead's distribution, the rows of its groups spread over the processes of ``group``.

    Each process calls every method with hidden states of its own, any number of them, at the same time as the others,
    and gets what FoldedHead would give for these. The backward pass leaves in the rows of a process the gradient of the
    SUM of all processes' losses, and in the ``replicated_parameters`` a part of it: summed over the processes these
    parts are that gradient. ``counts`` [V] of the tokens in a text spread the work, see owners_of_groups. Raises
    UserError for a head whose groups have no rows of their own.
    """

    scorer: RoutedScorer

    def __init__(self, whole: FoldedHead, group: Group = None, counts: Tensor | None = None) -> None:
        scorer = whole.scorer
        if not isinstance(scorer, LoopedLinearScorer):
            raise UserError(
                "only the groups' own rows can be spread over processes: use head.scorer=linear_sorted, "
                "linear_conditioned or linear_looped"
            )
        if isinstance(scorer, ConditionedLinearScorer) and scorer.options.shared:
            raise UserError(
                "head.group_scorer=shared scores groups through the tokens' network, which lies with their rows: to "
                "spread these over processes use linear, residual or wide"
            )
        owners = owners_of_groups(whole.partition, dist.get_world_size(group), counts)
        routed_scorer = RoutedScorer(scorer, owners, group)
        with_bias = whole.group_bias is not None
        softcap, routed_scorer.gradients_in_forward = whole.softcap, scorer.gradients_in_forward
        reader = copy.deepcopy(whole.group_reader)
        super().__init__(
            whole.hidden_size,
            whole.partition,
            routed_scorer,
            with_bias=with_bias,
            softcap=softcap,
            group_reader=reader,
        )
        self.to(whole.group_weight)
        self.training_options = whole.training_options
        with torch.no_grad():
            self.group_weight.copy_(whole.group_weight)
            if self.group_bias is not None and whole.group_bias is not None:
                self.group_bias.copy_(whole.group_bias)

    def replicated_parameters(self) -> list[nn.Parameter]:
        """Those that all processes have: the groups' weights, and what they and the tokens are scored from."""
        reader = [] if self.group_reader is None else list(self.group_reader.parameters())
        groups = [self.group_weight] if self.group_bias is None else [self.group_weight, self.group_bias]
        return groups + reader + self.scorer.replicated_parameters()

    def unsharded(self) -> FoldedHead:
        """The same head in one piece, in every process."""
        scorer = self.scorer.unsharded(self.group_weight)
        with_bias = self.group_bias is not None
        whole = FoldedHead(
            self.hidden_size,
            self.partition,
            scorer,
            softcap=self.softcap,
            with_bias=with_bias,
            group_reader=copy.deepcopy(self.group_reader),
        )
        whole.to(self.group_weight)
        whole.training_options = self.training_options
        with torch.no_grad():
            whole.group_weight.copy_(self.group_weight)
            if whole.group_bias is not None and self.group_bias is not None:
                whole.group_bias.copy_(self.group_bias)
        return whole

    def _own_log_prob(self, hidden: Tensor) -> Tensor:
        """``hidden`` [M, D] of anybody -> log P [M, this process's tokens]."""
        scorer = self.scorer
        groups = self.partition.group_of[scorer.own_tokens]
        by_group = self.group_log_prob(hidden)
        if scorer.local is None:
            return by_group[:, :0]
        return scorer.local.position_log_prob(hidden) + by_group[:, groups]

    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See Head.topk. Every process looks for the likeliest of its own tokens for everybody."""
        self.check_k(k)
        scorer = self.scorer
        return topk_of_all(hidden, k, self._own_log_prob, scorer.own_tokens, scorer.group)

    def sample(
        self,
        hidden: Tensor,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See Head.sample; without ``top_k`` [N, V] comes together. Each process draws for its own rows."""
        return Head.sample(self, hidden, temperature, top_k, top_p, generator)

    def entropy(self, hidden: Tensor) -> Tensor:
        """See Head.entropy."""

        def compute(rows: Tensor) -> tuple[Tensor]:
            log_prob = self._own_log_prob(rows)
            return (-(log_prob.exp() * log_prob).sum(dim=-1, keepdim=True),)

        (parts,) = on_every_rank(hidden, compute, self.scorer.group)
        return parts.sum(dim=0).squeeze(-1)

    def _mean_log_prob(self, hidden: Tensor, normalisers: list[Tensor]) -> Tensor:
        def compute(rows: Tensor) -> tuple[Tensor]:
            return (self._own_log_prob(rows).sum(dim=-1, keepdim=True),)

        (parts,) = on_every_rank(hidden, compute, self.scorer.group)
        return parts.sum(dim=0).squeeze(-1) / self.vocabulary_size
