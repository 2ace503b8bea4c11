"""Scale-and-shift with a correction of rank r per group: scale_g * (W_s h) + shift_g + B_g (A_g h)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.errors import UserError
from vocabfold.heads.kernels import add_product
from vocabfold.heads.loss_options import rowwise_product
from vocabfold.heads.partition import Partition
from vocabfold.heads.scorers import (
    ScaleShiftKernel,
    ScaleShiftScorer,
    SortedScaleShiftScorer,
    TokenScorer,
)


class LowRankKernel(ScaleShiftKernel):
    """ScaleShiftKernel with two more inputs: A [M, r, D] and B [M, S, r].

    With fixed shapes A of all groups is applied to each row, [N, M r], and all but its own group's made 0: that costs
    r times what the groups' scores do, and every sum over rows is a product.
    """

    def _num_choices(self, inputs: tuple[Tensor, ...]) -> int:
        num_choices = super()._num_choices(inputs)
        return max(num_choices, inputs[4].shape[:2].numel()) if self.targets.fixed else num_choices

    def _own(self, low: Tensor, part: slice, inputs: tuple[Tensor, ...]) -> Tensor:
        """``low`` [R, M r] of sorted rows ``part`` with 0 for all groups but the row's own."""
        num_groups, rank = inputs[4].shape[:2]
        own = self.targets.index[part, None] == torch.arange(num_groups, device=low.device)
        return (low.view(-1, num_groups, rank) * own.unsqueeze(-1)).flatten(1)

    def _flat(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """A as [M r, D] and B as [M r, S]."""
        return inputs[4].to(self.dtype).flatten(0, 1), inputs[5].to(self.dtype).transpose(1, 2).flatten(0, 1)

    def _correct(self, logits: Tensor, some: Tensor, part: slice, inputs: tuple[Tensor, ...]) -> Tensor:
        if self.targets.fixed:
            flat_down, flat_up = self._flat(inputs)
            low = self._own(some @ flat_down.t(), part, inputs)
            add_product(logits, low, flat_up)
            return low
        down, up = inputs[4].to(self.dtype), inputs[5].to(self.dtype)
        low = some.new_empty(len(some), down.shape[1])
        found, numbers = self.targets.segments(part)
        pieces = zip(found, *(tensor.split(numbers) for tensor in (some, low, logits)), strict=True)
        for group, some_rows, low_rows, logit_rows in pieces:
            torch.mm(some_rows, down[group].t(), out=low_rows)
            add_product(logit_rows, low_rows, up[group].t())
        return low

    def _correct_gradients(
        self,
        low: Tensor | None,
        slope: Tensor,
        some: Tensor,
        grad_some: Tensor,
        part: slice,
        inputs: tuple[Tensor, ...],
        gradients: list[Tensor],
    ) -> None:
        assert low is not None
        slope = slope.to(self.dtype)
        if self.targets.fixed:
            flat_down, flat_up = self._flat(inputs)
            all_grad_low = self._own(slope @ flat_up.t(), part, inputs)
            add_product(grad_some, all_grad_low, flat_down)
            add_product(gradients[4].flatten(0, 1), all_grad_low.t(), some)
            gradients[5] += (low.t() @ slope).view(*inputs[4].shape[:2], -1).transpose(1, 2)
            return
        down, up = inputs[4].to(self.dtype), inputs[5].to(self.dtype)
        found, numbers = self.targets.segments(part)
        pieces = zip(found, *(tensor.split(numbers) for tensor in (slope, some, low, grad_some)), strict=True)
        for group, slope_rows, some_rows, low_rows, grad_rows in pieces:
            grad_low = slope_rows @ up[group]
            add_product(grad_rows, grad_low, down[group])
            add_product(gradients[4][group], grad_low.t(), some_rows)
            add_product(gradients[5][group], slope_rows.t(), low_rows)


class LowRankScorer(ScaleShiftScorer):
    """The correction by autograd. A [M, r, D] starts as normal(0, ``init_std``), B [M, S, r] as 0: at first the scorer
    is scale-and-shift. Raises UserError for a rank below 1."""

    def __init__(self, hidden_size: int, partition: Partition, rank: int, init_std: float = 0.02) -> None:
        if rank < 1:
            raise UserError(f"head.rank is {rank}: choose at least 1, or head.scorer=scale_shift for no correction")
        super().__init__(hidden_size, partition, init_std)
        num_groups = len(partition.multi_groups)
        self.down = nn.Parameter(torch.empty(num_groups, rank, hidden_size))
        nn.init.normal_(self.down, std=init_std)
        self.up = nn.Parameter(torch.zeros(num_groups, partition.num_slots, rank))

    target_log_prob = TokenScorer.target_log_prob  # scale-and-shift's own has no room for the correction

    def _slot_log_prob(self, hidden: Tensor, index: Tensor) -> Tensor:
        low = torch.einsum("nkrd,nd->nkr", self.down[index], hidden)
        correction = torch.einsum("nksr,nkr->nks", self.up[index], low)
        return self._log_softmax(self._slot_logits(hidden, index) + correction)

    def _all_log_prob(self, hidden: Tensor) -> Tensor:
        shared = F.linear(hidden, self.shared).unsqueeze(1)
        low = torch.einsum("mrd,nd->nmr", self.down, hidden)
        correction = torch.einsum("msr,nmr->nms", self.up, low)
        log_prob = self._log_softmax(self.scale * shared + self._masked_shift() + correction)
        return log_prob[:, self.partition.multi_slot_exists]

    def _target_logit(self, hidden: Tensor, index: Tensor, slots: Tensor) -> Tensor:
        low = torch.einsum("nrd,nd->nr", self.down[index], hidden)
        return super()._target_logit(hidden, index, slots) + rowwise_product(self.up[index, slots], low)


class SortedLowRankScorer(SortedScaleShiftScorer, LowRankScorer):
    """The same numbers with gradients computed in the forward pass, a chunk of rows at a time."""

    kernel_type = LowRankKernel

    def _parameters_of_kernel(self) -> tuple[Tensor, ...]:
        return *super()._parameters_of_kernel(), self.down, self.up
