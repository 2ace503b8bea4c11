"""One linear layer a group on a hidden state that has seen the group: h_g = h + W_2 gelu(W_1 norm(h) + e_g).

The group is known before its token is scored, so that the second step can be an autoregressive one: what the backbone
says is read again in the light of the group, which a full softmax cannot do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.heads.kernels import has_fixed_shapes, product_dtype, total_log_prob
from vocabfold.heads.linear import LoopedLinearScorer, SortedLinearScorer
from vocabfold.heads.linear_kernel import LinearKernel
from vocabfold.heads.partition import Partition
from vocabfold.heads.readers import checked_width, normed
from vocabfold.heads.scorers import SortedTargets
from vocabfold.heads.views import View

PAIRS_A_TIME = 1 << 14  # of a hidden state and a group, when a row asks for many groups


@dataclass(frozen=True)
class ConditionOptions:
    """Variants of h_g = h + scale W_2 gelu(W_1 norm(h) + e_g), each off by default.

    ``scale``: a constant factor, which is also what the branch's learning rate is multiplied by under Adam. ``std``: of
    the e_g at first. ``gated``: the inner numbers are multiplied by 1 + a_g, a second vector of each group, 0 at first.
    ``detached``: the branch reads h, but has no say in what the backbone learns. ``shared``: the same branch, with a
    vector e of its own for "no group yet", stands before the groups' scores too.
    """

    scale: float = 1.0
    std: float = 0.02
    gated: bool = False
    detached: bool = False
    shared: bool = False


class ConditionedLinearScorer(SortedLinearScorer):
    """SortedLinearScorer on h_g. W_1 [width, D] starts as torch's own layers do, the e_g [M, width] as normal(0, std)
    and W_2 [D, width] as 0: at first the scorer is SortedLinearScorer. Raises UserError for a width below 1."""

    of_groups = ("group_embedding", "group_gate")

    def __init__(
        self,
        hidden_size: int,
        partition: Partition,
        width: int | None = None,
        tied_weight: nn.Parameter | None = None,
        init_std: float = 0.02,
        options: ConditionOptions = ConditionOptions(),
    ) -> None:
        super().__init__(hidden_size, partition, tied_weight, init_std)
        width = checked_width(hidden_size, width, "head.condition_width", "head.scorer=linear_sorted")
        self.options = options
        self.into = nn.Linear(hidden_size, width, bias=False)
        self.group_embedding = nn.Parameter(torch.empty(len(partition.multi_groups), width))
        nn.init.normal_(self.group_embedding, std=options.std)
        self.out = nn.Parameter(torch.zeros(hidden_size, width))
        self.group_gate = nn.Parameter(torch.zeros_like(self.group_embedding)) if options.gated else None
        self.no_group = nn.Parameter(torch.zeros(width)) if options.shared else None

    def maker(self) -> Callable[[Partition], LoopedLinearScorer]:
        """See LoopedLinearScorer.maker."""
        (hidden_size, width), options = self.out.shape, self.options
        return lambda partition: ConditionedLinearScorer(hidden_size, partition, width, options=options)

    def condition(self, hidden: Tensor, groups: Tensor) -> Tensor:
        """``hidden`` [..., D] and ``groups`` [...] that broadcast against each other -> h_g [..., D]. A group of one
        token has nothing to score and takes any other's e_g."""
        if len(self.partition.multi_groups) == 0:
            return hidden.expand(*groups.shape, -1)
        index = self.partition.index_of(groups).clamp(min=0)
        return self._seen(hidden, self._read(hidden, self.into.weight), index, *self._of_groups)

    @property
    def _of_groups(self) -> tuple[Tensor, ...]:
        """The parameters of the network after W_1."""
        gate = () if self.group_gate is None else (self.group_gate,)
        return self.out, self.group_embedding, *gate

    def _seen(
        self,
        hidden: Tensor,
        read: Tensor,
        index: Tensor,
        out: Tensor,
        group_embedding: Tensor,
        group_gate: Tensor | None = None,
    ) -> Tensor:
        """h_g from ``read``, what ``_read`` returns, and the ``index`` of the groups among those of several tokens."""
        inner = F.gelu(read + F.embedding(index, group_embedding))
        if group_gate is not None:
            inner = inner * (1 + F.embedding(index, group_gate))
        return hidden + self._written(inner, out)

    def _view(self, groups: Tensor) -> View:
        """``condition`` for a kernel that reads rows whose ``groups`` [N] have more than one token."""
        index = self.partition.index_of(groups)

        def condition(some: Tensor, rows: Tensor, into: Tensor, *of_groups: Tensor) -> Tensor:
            return self._seen(some, self._read(some, into), index[rows], *of_groups)

        return View(condition, (self.into.weight, *self._of_groups))

    def before_group(self, hidden: Tensor) -> Tensor:
        """See TokenScorer.before_group."""
        if self.no_group is None:
            return hidden
        return hidden + self._written(F.gelu(self._read(hidden, self.into.weight) + self.no_group), self.out)

    def _read(self, hidden: Tensor, into: Tensor) -> Tensor:
        return F.linear(normed(hidden.detach() if self.options.detached else hidden), into)

    def _written(self, inner: Tensor, out: Tensor) -> Tensor:
        written = F.linear(inner, out)
        return written if self.options.scale == 1 else self.options.scale * written

    def total_log_prob(
        self, hidden: Tensor, groups: Tensor, slots: Tensor, counted: Tensor, with_hits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See TokenScorer.total_log_prob. On a CPU the network is computed with the rows of a chunk."""
        if has_fixed_shapes(hidden):
            return super().total_log_prob(self.condition(hidden, groups), groups, slots, counted, with_hits)
        view, targets = self._view(groups), SortedTargets(self.partition, groups, slots, counted)
        kernel = LinearKernel(self.partition, targets, self.tied, product_dtype(hidden), view)
        total, hits = total_log_prob(kernel, (hidden, *self._parameters_of_kernel(), *view.parameters), with_hits)
        return total, self._with_certain(hits, groups, counted)

    def target_log_prob(self, hidden: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
        """See TokenScorer.target_log_prob."""
        return super().target_log_prob(self.condition(hidden, groups), groups, slots)

    def target_logit(self, hidden: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
        """See TokenScorer.target_logit."""
        return super().target_logit(self.condition(hidden, groups), groups, slots)

    def group_log_prob(self, hidden: Tensor, groups: Tensor) -> Tensor:
        """See TokenScorer.group_log_prob. Each pair of a row and a group has a hidden state of its own; W_1 is applied
        once a row."""
        step = max(1, PAIRS_A_TIME // max(1, groups.shape[1]))
        parts = []
        for rows, asked in zip(hidden.split(step), groups.split(step), strict=True):
            seen = self.condition(rows.unsqueeze(1), asked).flatten(0, 1)
            parts.append(super().group_log_prob(seen, asked.reshape(-1, 1)))
        return torch.cat(parts).view(*groups.shape, self.partition.num_slots)

    def _numbers_a_row(self) -> int:
        num_groups, width = self.group_embedding.shape
        return super()._numbers_a_row() + num_groups * (width + self.weight.shape[1])

    def _states(self, hidden: Tensor, groups: slice) -> Tensor:
        index = torch.arange(len(self.group_embedding), device=hidden.device)[groups, None]
        return self._seen(hidden, self._read(hidden, self.into.weight), index, *self._of_groups)

    def _group_logits(self, hidden: Tensor, places: Tensor) -> Tensor:
        rows = self.weight[self.partition.multi_tokens[places] if self.tied else places]
        products = torch.bmm(self._states(hidden, slice(None)), rows.transpose(1, 2))
        return (products + self.bias[places].unsqueeze(1)).transpose(0, 1)
