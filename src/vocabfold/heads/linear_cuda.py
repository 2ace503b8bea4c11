"""Linear scorers on CUDA: the products of all groups in a few launches. Not yet measured on a GPU.

In bfloat16 torch's grouped_mm takes rows sorted by group as they are; in any other dtype, fp16 on a T4 included, the
rows of each group are padded to blocks, and a batched product takes a block each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vocabfold.heads.kernels import Rows, chunks, log_prob_and_slope, sum_dtype
from vocabfold.heads.partition import Partition
from vocabfold.heads.scorers import SortedTargets

BLOCK_ROWS = 32
GATHERED_ELEMENTS = 1 << 24  # numbers of the groups' matrices that are copied for their blocks at a time
ALIGNMENT = 16  # grouped_mm wants rows of a multiple of 16 bytes


class GroupedLinearKernel:
    """The same numbers as linear.LinearKernel: inputs hidden [N, D], W and b.

    ``grouped``: use grouped_mm; None: where it runs fast, in bfloat16 from compute capability 8.0 on.
    """

    def __init__(
        self,
        partition: Partition,
        targets: SortedTargets,
        tied: bool,
        dtype: torch.dtype,
        grouped: bool | None = None,
    ) -> None:
        self.partition, self.targets, self.tied, self.dtype = partition, targets, tied, dtype
        if grouped is None:
            device = targets.rows.device
            grouped = dtype == torch.bfloat16 and hasattr(F, "grouped_mm") and device.type == "cuda"
            grouped = grouped and torch.cuda.get_device_capability(device) >= (8, 0)
        self.grouped = grouped

    def __call__(self, inputs: tuple[Tensor, ...], weights: Tensor | None, needs: list[bool], with_hits: bool) -> Rows:
        """See Kernel."""
        hidden, weight, bias = inputs
        targets, partition = self.targets, self.partition
        log_prob = hidden.new_zeros(len(hidden), dtype=sum_dtype(self.dtype))
        num_slots = -(-partition.num_slots // ALIGNMENT) * ALIGNMENT if self.grouped else partition.num_slots
        columns = torch.arange(num_slots, device=hidden.device)
        exists = columns < partition.sizes[partition.multi_groups, None]
        owned = exists.flatten().nonzero().squeeze(-1)
        places = (partition.multi_starts[:-1, None] + columns).where(exists, 0)
        group_rows = weight[partition.multi_tokens[places] if self.tied else places].to(self.dtype)
        padded_bias = bias.to(log_prob.dtype)[places].where(exists, -torch.inf)
        hits = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device) if with_hits else None
        wanted = any(needs)
        grad_hidden = torch.zeros_like(hidden) if wanted else None
        grad_rows = torch.zeros_like(group_rows, dtype=log_prob.dtype) if needs[1] else None
        grad_bias = torch.zeros_like(padded_bias) if wanted else None
        for part in chunks(len(targets.rows), num_slots):
            rows, groups, slots = targets.rows[part], targets.index[part], targets.slots[part]
            some = hidden.index_select(0, rows).to(self.dtype)
            product = (_Grouped if self.grouped else _Blocks)(groups, group_rows)
            logits = product.logits(some).to(log_prob.dtype) + padded_bias[groups]
            if hits is not None:
                hits[rows] = logits.argmax(dim=-1) == slots
            some_weights = None if weights is None else weights[rows].to(log_prob.dtype)
            chosen, slope = log_prob_and_slope(logits, slots, some_weights, wanted)
            log_prob.index_copy_(0, rows, chosen)
            if slope is None or grad_hidden is None or grad_bias is None:
                continue
            grad_bias.index_add_(0, groups, slope)
            slope = slope.to(self.dtype)
            grad_hidden.index_copy_(0, rows, product.grad_hidden(slope).to(hidden.dtype))
            if grad_rows is not None:
                product.add_grad_rows(grad_rows, slope, some)
        grad_weight = None
        if grad_rows is not None:
            owners = partition.multi_tokens if self.tied else torch.arange(len(bias), device=hidden.device)
            grad_weight = torch.zeros_like(weight, dtype=log_prob.dtype)
            grad_weight.index_copy_(0, owners, grad_rows.flatten(0, 1).index_select(0, owned))
        if grad_bias is not None:
            grad_bias = grad_bias.flatten().index_select(0, owned)
        return Rows(log_prob, hits, [grad_hidden, grad_weight, grad_bias])


class _Grouped:
    """Products of rows sorted by group with their groups' matrices [M, S, D], through grouped_mm."""

    def __init__(self, groups: Tensor, group_rows: Tensor) -> None:
        self.group_rows = group_rows
        self.numbers = torch.bincount(groups, minlength=len(group_rows))
        self.ends = self.numbers.cumsum(0).to(torch.int32)

    def logits(self, some: Tensor) -> Tensor:
        return F.grouped_mm(some, self.group_rows.transpose(1, 2), offs=self.ends)

    def grad_hidden(self, slope: Tensor) -> Tensor:
        return F.grouped_mm(slope, self.group_rows, offs=self.ends)

    def add_grad_rows(self, grad_rows: Tensor, slope: Tensor, some: Tensor) -> None:
        product = F.grouped_mm(slope.t(), some, offs=self.ends)
        # What a group without rows gets is not said to be zero.
        grad_rows += product.masked_fill((self.numbers == 0)[:, None, None], 0.0)


class _Blocks:
    """The same through batched products of blocks of BLOCK_ROWS rows, each of one group, zeros where it has no more."""

    def __init__(self, groups: Tensor, group_rows: Tensor) -> None:
        numbers = torch.bincount(groups, minlength=len(group_rows))
        blocks = (numbers + BLOCK_ROWS - 1) // BLOCK_ROWS
        first_block = blocks.cumsum(0) - blocks
        rank = torch.arange(len(groups), device=groups.device) - (numbers.cumsum(0) - numbers)[groups]
        self.places = first_block[groups] * BLOCK_ROWS + rank
        self.group_of_block = torch.arange(len(numbers), device=groups.device).repeat_interleave(blocks)
        self.group_rows = group_rows

    def _blocks(self, values: Tensor) -> Tensor:
        padded = values.new_zeros(len(self.group_of_block) * BLOCK_ROWS, values.shape[1])
        return padded.index_copy_(0, self.places, values).view(len(self.group_of_block), BLOCK_ROWS, -1)

    def _products(self, values: Tensor, transposed: bool) -> Tensor:
        blocks = self._blocks(values)
        step = max(1, GATHERED_ELEMENTS // self.group_rows[:1].numel())
        products = []
        for start in range(0, len(blocks), step):
            part = slice(start, start + step)
            matrices = self.group_rows[self.group_of_block[part]]
            products.append(torch.bmm(blocks[part], matrices.transpose(1, 2) if transposed else matrices))
        return torch.cat(products).flatten(0, 1).index_select(0, self.places)

    def logits(self, some: Tensor) -> Tensor:
        return self._products(some, transposed=True)

    def grad_hidden(self, slope: Tensor) -> Tensor:
        return self._products(slope, transposed=False)

    def add_grad_rows(self, grad_rows: Tensor, slope: Tensor, some: Tensor) -> None:
        slope, some = self._blocks(slope), self._blocks(some)
        step = max(1, GATHERED_ELEMENTS // self.group_rows[:1].numel())
        for start in range(0, len(slope), step):
            part = slice(start, start + step)
            product = torch.bmm(slope[part].transpose(1, 2), some[part])
            grad_rows.index_add_(0, self.group_of_block[part], product.to(grad_rows.dtype))
