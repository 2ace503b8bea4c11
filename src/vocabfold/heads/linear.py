"""One linear layer per group, W_g h + b_g, untied or with the input embedding's rows: looped by autograd, and fast."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.heads.base import log_softmax
from vocabfold.heads.kernels import (
    FIXED_CHUNK_ELEMENTS,
    Kernel,
    has_fixed_shapes,
    sum_dtype,
    triton_kernels,
)
from vocabfold.heads.linear_blocks import BlockedLinearKernel
from vocabfold.heads.linear_kernel import LinearKernel
from vocabfold.heads.linear_triton import TritonLinearKernel
from vocabfold.heads.loss_options import rowwise_product
from vocabfold.heads.partition import Partition
from vocabfold.heads.scorers import FastTokenScorer, SortedTargets, TokenScorer

GROUPS_A_BLOCK = 64  # whose products are one batch on a CPU
# Of hidden states and groups on a CPU: so many pairs at most, each with so many numbers in its group's rows, are
# cheaper to copy than to loop over.
GATHERED_PAIRS, GATHERED_NUMBERS = 256, 1 << 15
GATHERED_ELEMENTS = 1 << 22  # numbers of weight rows copied together at a time when few groups are asked for


class LoopedLinearScorer(TokenScorer):
    """W_g h + b_g, applied in a loop over the groups with masks (the paper's slow listing, arXiv 2411.06371).

    ``tied_weight`` [V, D], in token order, lends the rows of the input embedding; without it the head has its own, one
    for each token of ``partition.multi_tokens`` in that order, and start as normal(0, ``init_std``). So is the bias.
    """

    of_tokens: tuple[str, ...] = ("weight", "bias")  # parameters with a row for each of ``partition.multi_tokens``
    of_groups: tuple[str, ...] = ()  # with a row for each of the M groups; the others belong to all of them

    def __init__(
        self,
        hidden_size: int,
        partition: Partition,
        tied_weight: nn.Parameter | None = None,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(partition)
        num_tokens = len(partition.multi_tokens)
        self.tied = tied_weight is not None
        if tied_weight is None:
            tied_weight = nn.Parameter(torch.empty(num_tokens, hidden_size))
            nn.init.normal_(tied_weight, std=init_std)
        self.weight = tied_weight
        self.bias = nn.Parameter(torch.zeros(num_tokens))

    @torch.no_grad()
    def start_from(self, log_frequency: Tensor) -> None:
        """See TokenScorer.start_from."""
        self.bias.copy_(log_frequency[self.partition.multi_tokens])

    @torch.no_grad()
    def prepare_to_decode(self) -> None:
        """See TokenScorer.prepare_to_decode."""
        if self.tied and self.partition.first_multi_token is None:
            self.weight = nn.Parameter(self.weight[self.partition.multi_tokens], requires_grad=False)
            self.tied = False

    def maker(self) -> Callable[[Partition], LoopedLinearScorer]:
        """What makes a scorer of this kind and these sizes, with rows of its own, on any partition."""
        return partial(type(self), self.weight.shape[1])

    def condition(self, hidden: Tensor, groups: Tensor) -> Tensor:
        """What the rows of ``groups`` are multiplied with: ``hidden`` [N, D] itself."""
        return hidden

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        """(W_g, b_g) of each of the M groups, cut once: the gradient of each slice would be as large as all rows."""
        sizes = [stop - start for start, stop in pairwise(self.partition.multi_bounds)]
        rows = self.weight[self.partition.multi_tokens] if self.tied else self.weight
        return list(zip(rows.split(sizes), self.bias.split(sizes), strict=True))

    def _log_prob_of_group(self, hidden: Tensor, index: int) -> Tensor:
        start, stop = self.partition.multi_bounds[index : index + 2]
        rows = self.weight[self.partition.multi_tokens[start:stop]] if self.tied else self.weight[start:stop]
        return self._log_softmax(F.linear(hidden, rows, self.bias[start:stop]))

    def target_log_prob(self, hidden: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
        """See TokenScorer.target_log_prob."""
        result = hidden.new_zeros(len(hidden), dtype=sum_dtype(self.bias.dtype))
        indices, layers = self.partition.multi_index[groups], self._layers()
        for index in indices[indices >= 0].unique().tolist():
            members = (indices == index).nonzero().squeeze(-1)
            log_prob = self._log_softmax(F.linear(hidden[members], *layers[index]))
            chosen = log_prob.gather(-1, slots[members].unsqueeze(-1)).squeeze(-1)
            result = result.index_put((members,), chosen)
        return result

    def _slot_log_prob(self, hidden: Tensor, index: Tensor) -> Tensor:
        shape = (*index.shape, self.partition.num_slots)
        result = hidden.new_full(shape, -torch.inf, dtype=sum_dtype(self.bias.dtype))
        for group in index.unique().tolist():
            rows, columns = (index == group).nonzero(as_tuple=True)
            log_prob = self._log_prob_of_group(hidden[rows], group)
            result[rows, columns, : log_prob.shape[-1]] = log_prob
        return result

    def _all_log_prob(self, hidden: Tensor) -> Tensor:
        return torch.cat([self._log_softmax(F.linear(hidden, *layer)) for layer in self._layers()], dim=-1)

    def _target_logit(self, hidden: Tensor, index: Tensor, slots: Tensor) -> Tensor:
        places = self.partition.multi_starts[index] + slots
        rows = F.embedding(self.partition.multi_tokens[places] if self.tied else places, self.weight)
        return rowwise_product(hidden, rows) + self.bias[places]


class SortedLinearScorer(FastTokenScorer, LoopedLinearScorer):
    """The same numbers: rows sorted by group, one product per group that has some, gradients in the forward pass.

    On CUDA the groups' products run together: in Triton's kernels (linear_triton.py) or, where these cannot run, as
    products of blocks (linear_blocks.py).
    """

    capturable = True

    def _kernel(self, groups: Tensor, slots: Tensor, counted: Tensor, dtype: torch.dtype) -> Kernel:
        targets = SortedTargets(self.partition, groups, slots, counted)
        if not targets.fixed:
            return LinearKernel(self.partition, targets, self.tied, dtype)
        module = triton_kernels(dtype, (self.weight, self.bias))
        if module is not None and self.partition.num_slots <= module.MOST_COLUMNS:
            return TritonLinearKernel(module, self.partition, targets, self.tied, dtype)
        return BlockedLinearKernel(self.partition, targets, self.tied, dtype)

    def _parameters_of_kernel(self) -> tuple[Tensor, ...]:
        return self.weight, self.bias

    def _slot_log_prob(self, hidden: Tensor, index: Tensor) -> Tensor:
        num_slots, num_rows, numbers = self.partition.num_slots, len(self.weight), index.numel()
        reads_all = numbers * num_slots >= num_rows  # reading every row once is cheaper than copying these
        if index.device.type == "cpu":
            if reads_all or numbers > GATHERED_PAIRS or num_slots * hidden.shape[1] > GATHERED_NUMBERS:
                return self._slot_log_prob_by_group(hidden, index)
        elif reads_all:
            return super()._slot_log_prob(hidden, index)
        places, exists = self.partition.places_of(index)
        bias = self.bias.take(places).where(exists, -torch.inf)
        rows = self.partition.multi_tokens.take(places) if self.tied else places
        step = max(1, GATHERED_ELEMENTS // (index.shape[1] * num_slots * hidden.shape[1]))
        log_probs = []
        for start in range(0, len(index), step):
            part = slice(start, start + step)
            weight = F.embedding(rows[part], self.weight).flatten(1, 2)
            # A row times a matrix: a matrix times a column takes ten times as long on a CPU where there are several.
            logits = torch.bmm(hidden[part].unsqueeze(1), weight.transpose(1, 2)).view_as(bias[part])
            log_probs.append(log_softmax(logits + bias[part]))
        return torch.cat(log_probs) if log_probs else bias

    def _all_log_prob(self, hidden: Tensor) -> Tensor:
        if not has_fixed_shapes(hidden):
            return self._log_prob_by_group(hidden)
        partition = self.partition
        exists, tokens = partition.multi_slot_exists, partition.multi_tokens
        columns = torch.arange(exists.shape[1], device=hidden.device)
        places = (partition.multi_starts[:-1, None] + columns).where(exists, 0)
        owned = partition.multi_index[partition.group_of[tokens]] * exists.shape[1] + partition.slot_of[tokens]
        parts = [
            self._log_softmax(self._group_logits(rows, places).masked_fill(~exists, -torch.inf)).flatten(1)[:, owned]
            for rows in hidden.split(max(1, FIXED_CHUNK_ELEMENTS // max(1, self._numbers_a_row())))
        ]
        return torch.cat(parts)

    def _states(self, hidden: Tensor, groups: slice) -> Tensor:
        """What the layers of ``groups``, B of the M, read: ``hidden`` [N, D] -> [B, N, D]."""
        return hidden.expand(len(self.partition.multi_groups[groups]), -1, -1)

    def _log_prob_by_group(self, hidden: Tensor) -> Tensor:
        """``hidden`` [N, D] -> [N, V'], a batched product for each block of groups of nearly equal sizes."""
        sizes = self.partition.sizes[self.partition.multi_groups]
        if sizes.max() - sizes.min() > 1:
            parts = [
                self._log_softmax(F.linear(self._states(hidden, slice(group, group + 1))[0], *layer))
                for group, layer in enumerate(self._layers())
            ]
            return torch.cat(parts, dim=-1)
        blocks = range(0, len(sizes), GROUPS_A_BLOCK)
        distance = int(sizes.min())
        return torch.cat(
            [self._log_prob_of_block(hidden, slice(first, first + GROUPS_A_BLOCK), distance) for first in blocks],
            dim=-1,
        )

    def _log_prob_of_block(self, hidden: Tensor, groups: slice, distance: int) -> Tensor:
        """``hidden`` [N, D] -> [N, tokens of these groups]. They start nearly ``distance`` rows after each other:
        windows on the rows at that distance, so much longer that each holds its group, are a batch without a copy."""
        states = self._states(hidden, groups)
        edges = self.partition.multi_starts[groups.start : groups.start + len(states) + 1]
        start, stop = self.partition.multi_bounds[groups.start], self.partition.multi_bounds[groups.start + len(states)]
        length = stop - start - distance * (len(states) - 1)
        tokens = self.partition.multi_tokens[start:stop]
        rows = F.embedding(tokens, self.weight) if self.tied else self.weight[start:stop]
        windows, bias = (tensor.unfold(0, length, distance) for tensor in (rows, self.bias[start:stop]))
        begin = start + distance * torch.arange(len(states), device=hidden.device)
        row = begin[:, None] + torch.arange(length, device=hidden.device)
        is_own = (row >= edges[:-1, None]) & (row < edges[1:, None])
        logits = torch.baddbmm(bias.where(is_own, -torch.inf).unsqueeze(1), states, windows)  # [B, N, length]
        log_prob = self._log_softmax(logits).transpose(0, 1).flatten(1)
        return log_prob.index_select(1, is_own.flatten().nonzero().squeeze(-1))

    def _numbers_a_row(self) -> int:
        """What ``_group_logits`` holds for each hidden state."""
        return self.partition.multi_slot_exists.numel()

    def _group_logits(self, hidden: Tensor, places: Tensor) -> Tensor:
        """``hidden`` [N, D] -> the logits [N, M, S] of the tokens at ``places`` [M, S] among those of several."""
        rows = self.weight[self.partition.multi_tokens] if self.tied else self.weight
        return F.linear(hidden, rows, self.bias)[:, places]

    def _slot_log_prob_by_group(self, hidden: Tensor, index: Tensor) -> Tensor:
        """A product a group that anyone asks for, with its rows where they lie: nothing of the weight is copied."""
        bounds = self.partition.multi_bounds
        asked, order = index.flatten().sort()
        some = hidden[order // max(1, index.shape[1])]
        logits = some.new_full((len(asked), self.partition.num_slots), -torch.inf, dtype=sum_dtype(self.bias.dtype))
        groups, numbers = asked.unique_consecutive(return_counts=True)
        end = 0
        for group, number in zip(groups.tolist(), numbers.tolist(), strict=True):
            begin, end = end, end + number
            start, stop = bounds[group : group + 2]
            rows = self.weight[self.partition.multi_tokens[start:stop]] if self.tied else self.weight[start:stop]
            logits[begin:end, : stop - start] = F.linear(some[begin:end], rows, self.bias[start:stop])
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return log_softmax(logits)[place].view(*index.shape, self.partition.num_slots)
