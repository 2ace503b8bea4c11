"""Linear scorers on a device without Triton: the rows of each group padded to blocks, whose products run together."""

from __future__ import annotations

import torch
from torch import Tensor

from vocabfold.heads.kernels import Rows, chunks, log_prob_and_slope, only_counted, sum_dtype
from vocabfold.heads.partition import Partition
from vocabfold.heads.scorers import SortedTargets

BLOCK_ROWS = 32
GATHERED_ELEMENTS = 1 << 24  # numbers of the groups' matrices that are copied for their blocks at a time


class BlockedLinearKernel:
    """The same numbers as LinearKernel: inputs hidden [N, D], W and b; targets are of fixed shapes."""

    def __init__(self, partition: Partition, targets: SortedTargets, tied: bool, dtype: torch.dtype) -> None:
        self.partition, self.targets, self.tied, self.dtype = partition, targets, tied, dtype

    def __call__(self, inputs: tuple[Tensor, ...], weights: Tensor | None, needs: list[bool], with_hits: bool) -> Rows:
        """See Kernel."""
        hidden, weight, bias = inputs
        targets, partition = self.targets, self.partition
        log_prob = hidden.new_zeros(len(hidden), dtype=sum_dtype(self.dtype))
        hits = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device) if with_hits else None
        wanted = any(needs)
        grad_hidden = torch.zeros_like(hidden) if wanted else None
        if targets.num_groups == 0:
            grads = [torch.zeros_like(given) if wanted else None for given in (weight, bias)]
            return Rows(log_prob, hits, [grad_hidden, *grads])
        exists = partition.multi_slot_exists
        columns = torch.arange(partition.num_slots, device=hidden.device)
        places = (partition.multi_starts[:-1, None] + columns).masked_fill(~exists, 0)
        group_rows = weight[partition.multi_tokens[places] if self.tied else places].to(self.dtype)
        padded_bias = bias.to(log_prob.dtype)[places].masked_fill(~exists, -torch.inf)
        grad_rows = torch.zeros_like(group_rows, dtype=log_prob.dtype) if needs[1] else None
        grad_bias = torch.zeros_like(padded_bias) if wanted else None
        for part in chunks(len(targets.rows), partition.num_slots, targets.fixed):
            rows, groups, slots = targets.rows[part], targets.index[part], targets.slots[part]
            some = hidden.index_select(0, rows).to(self.dtype)
            product = _Blocks(groups, group_rows)
            logits = product.logits(some).to(log_prob.dtype) + padded_bias[groups]
            counted = targets.counted_in(part)
            if hits is not None:
                hits[rows] = only_counted(logits.argmax(dim=-1) == slots, counted)
            some_weights = targets.weights(part, weights, log_prob.dtype)
            chosen, slope = log_prob_and_slope(logits, slots, some_weights, wanted)
            log_prob.index_copy_(0, rows, only_counted(chosen, counted))
            if slope is None or grad_hidden is None or grad_bias is None:
                continue
            grad_bias.index_add_(0, groups, slope)
            slope = slope.to(self.dtype)
            grad_hidden.index_copy_(0, rows, product.grad_hidden(slope).to(hidden.dtype))
            if grad_rows is not None:
                product.add_grad_rows(grad_rows, slope, some)
        # Where each token stands in [M, S].
        tokens = partition.multi_tokens
        owned = partition.multi_index[partition.group_of[tokens]] * partition.num_slots + partition.slot_of[tokens]
        grad_weight = None
        if grad_rows is not None:
            grad_weight = grad_rows.flatten(0, 1).index_select(0, owned)
            if self.tied:
                all_rows = torch.zeros_like(weight, dtype=log_prob.dtype)
                grad_weight = all_rows.index_copy_(0, tokens, grad_weight)
        if grad_bias is not None:
            grad_bias = grad_bias.flatten().index_select(0, owned)
        return Rows(log_prob, hits, [grad_hidden, grad_weight, grad_bias])


class _Blocks:
    """Products of rows sorted by group with their groups' matrices [M, S, D]: batched ones of blocks of BLOCK_ROWS
    rows, each of one group, zeros where it has no more. There are as many blocks as there can be."""

    def __init__(self, groups: Tensor, group_rows: Tensor) -> None:
        numbered = torch.arange(len(group_rows) + 1, device=groups.device)
        starts = torch.searchsorted(groups, numbered)
        blocks = (starts.diff() + BLOCK_ROWS - 1) // BLOCK_ROWS
        ends = blocks.cumsum(0)
        rank = torch.arange(len(groups), device=groups.device) - starts[groups]
        self.places = (ends - blocks)[groups] * BLOCK_ROWS + rank
        self.num_blocks = len(groups) // BLOCK_ROWS + min(len(group_rows), len(groups))
        every = torch.arange(self.num_blocks, device=groups.device)
        self.group_of_block = torch.searchsorted(ends, every, right=True).clamp(max=len(group_rows) - 1)
        self.group_rows = group_rows

    def _blocks(self, values: Tensor) -> Tensor:
        padded = values.new_zeros(self.num_blocks * BLOCK_ROWS, values.shape[1])
        return padded.index_copy_(0, self.places, values).view(self.num_blocks, BLOCK_ROWS, -1)

    def _products(self, values: Tensor, transposed: bool) -> Tensor:
        blocks = self._blocks(values)
        products = []
        for part in self._parts():
            matrices = self.group_rows[self.group_of_block[part]]
            products.append(torch.bmm(blocks[part], matrices.transpose(1, 2) if transposed else matrices))
        return torch.cat(products).flatten(0, 1).index_select(0, self.places)

    def _parts(self) -> list[slice]:
        step = max(1, GATHERED_ELEMENTS // self.group_rows[:1].numel())
        return [slice(start, start + step) for start in range(0, self.num_blocks, step)]

    def logits(self, some: Tensor) -> Tensor:
        return self._products(some, transposed=True)

    def grad_hidden(self, slope: Tensor) -> Tensor:
        return self._products(slope, transposed=False)

    def add_grad_rows(self, grad_rows: Tensor, slope: Tensor, some: Tensor) -> None:
        slope, some = self._blocks(slope), self._blocks(some)
        for part in self._parts():
            product = torch.bmm(slope[part].transpose(1, 2), some[part])
            grad_rows.index_add_(0, self.group_of_block[part], product.to(grad_rows.dtype))
