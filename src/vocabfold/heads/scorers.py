"""The contract of a folded head's token scorers, P(t | g, h) over the slots of a group, and scale-and-shift."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.errors import UserError
from vocabfold.heads.base import log_softmax
from vocabfold.heads.kernels import (
    Kernel,
    Rows,
    add_product,
    chunks,
    counted_weights,
    each_log_prob,
    has_fixed_shapes,
    log_prob_and_slope,
    only_counted,
    product_dtype,
    sum_dtype,
    total_log_prob,
    zero_gradients,
)
from vocabfold.heads.loss_options import rowwise_product, soft_cap
from vocabfold.heads.partition import Partition


class TokenScorer(nn.Module, ABC):
    """Log-probabilities of the slots within groups; a slot that no token owns has log-probability -inf.

    A scorer implements ``_slot_log_prob`` and ``_all_log_prob``, for the M groups with more than one token; the token
    of any other group is certain. What it inherits for training is plain autograd, the slow reference of a fast one.
    """

    gradients_in_forward = False  # whether training keeps gradients, not logits: the head's group softmax follows
    capturable = False  # of total_log_prob, see Head.capturable
    softcap: float | None = None  # the head's; of those that keep logits only

    def __init__(self, partition: Partition) -> None:
        super().__init__()
        self.partition = partition

    @abstractmethod
    def _slot_log_prob(self, hidden: Tensor, index: Tensor) -> Tensor:
        """``hidden`` [N, D], ``index`` [N, K] among the M groups -> log P(. | group, hidden) [N, K, S]."""

    @abstractmethod
    def _all_log_prob(self, hidden: Tensor) -> Tensor:
        """``hidden`` [N, D] -> log P(slot | its group, hidden) of the tokens at the partition's multi_positions."""

    @abstractmethod
    def _target_logit(self, hidden: Tensor, index: Tensor, slots: Tensor) -> Tensor:
        """``hidden`` [N, D], ``index`` [N] among the M groups, ``slots`` [N] -> their logits [N], without softcap."""

    def start_from(self, log_frequency: Tensor) -> None:
        """Make the biases of the slots ``log_frequency`` [V] of their tokens. Raises UserError without such biases."""
        raise UserError("this token scorer has no biases to start from counts: use head.count_biases=false")

    def prepare_to_decode(self) -> None:
        """See Head.prepare_to_decode."""

    def before_group(self, hidden: Tensor) -> Tensor:
        """What the groups' scores read [N, D] where the head has no reader of its own: ``hidden`` [N, D] itself, but
        for a scorer that shares its network with them."""
        return hidden

    def target_logit(self, hidden: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
        """``hidden`` [N, D], ``groups`` [N], ``slots`` [N] -> the logit [N], which minus its log-probability is the log
        normaliser of the group; 0 where the group has one token."""
        if len(self.partition.multi_groups) == 0:
            return hidden.new_zeros(len(hidden), dtype=sum_dtype(hidden.dtype))
        index = self.partition.index_of(groups)
        logit = soft_cap(self._target_logit(hidden, index.clamp(min=0), slots), self.softcap)
        return torch.where(index >= 0, logit, 0.0)

    def _log_softmax(self, logits: Tensor) -> Tensor:
        """Over the slots, whose logits are -inf where no token owns one."""
        if self.softcap is not None:
            logits = torch.where(logits == -torch.inf, logits, soft_cap(logits, self.softcap))
        return log_softmax(logits)

    def total_log_prob(
        self, hidden: Tensor, groups: Tensor, slots: Tensor, counted: Tensor, with_hits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Training: (sum of log P(slot | group, hidden) over the rows ``counted`` [N], how many of these slots are
        the likeliest of their group, where asked for)."""
        log_prob = torch.where(counted, self.target_log_prob(hidden, groups, slots), 0.0).sum()
        if not with_hits:
            return log_prob, None
        likeliest = self.group_log_prob(hidden.detach(), groups.unsqueeze(-1)).squeeze(1).argmax(dim=-1)
        return log_prob, ((likeliest == slots) & counted).sum()

    def target_log_prob(self, hidden: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
        """``hidden`` [N, D], ``groups`` [N], ``slots`` [N] -> log P(slot | group, hidden) [N]."""
        log_prob = self.group_log_prob(hidden, groups.unsqueeze(-1)).squeeze(1)
        return log_prob.gather(-1, slots.unsqueeze(-1)).squeeze(-1)

    def group_log_prob(self, hidden: Tensor, groups: Tensor) -> Tensor:
        """``hidden`` [N, D], ``groups`` [N, K] -> log P(. | group, hidden) [N, K, S] for K groups of each row."""
        index = self.partition.index_of(groups)
        if not self.partition.has_single_groups:
            return self._slot_log_prob(hidden, index)
        certain = hidden.new_full((self.partition.num_slots,), -torch.inf, dtype=sum_dtype(hidden.dtype))
        certain[:1].zero_()  # certain[0] = 0 may copy the number to the device, and wait for it
        if len(self.partition.multi_groups) == 0:
            return certain.expand(*groups.shape, -1)
        log_prob = self._slot_log_prob(hidden, index.clamp(min=0))
        return torch.where((index >= 0).unsqueeze(-1), log_prob, certain.to(log_prob.dtype))

    def position_log_prob(self, hidden: Tensor) -> Tensor:
        """``hidden`` [N, D] -> log P(slot | its group, hidden) [N, V], by position."""
        if not self.partition.has_single_groups:
            return self._all_log_prob(hidden)
        certain = hidden.new_zeros(len(hidden), self.partition.vocabulary_size, dtype=sum_dtype(hidden.dtype))
        if len(self.partition.multi_groups) == 0:
            return certain
        log_prob = self._all_log_prob(hidden)
        return certain.to(log_prob.dtype).index_copy(1, self.partition.multi_positions, log_prob)


class FastTokenScorer(TokenScorer):
    """Trains through a kernel that sorts the rows by group and computes the gradients on the way forward."""

    gradients_in_forward = True

    @abstractmethod
    def _kernel(self, groups: Tensor, slots: Tensor, counted: Tensor, dtype: torch.dtype) -> Kernel:
        """The kernel for these targets."""

    @abstractmethod
    def _parameters_of_kernel(self) -> tuple[Tensor, ...]:
        """Its inputs after hidden."""

    def total_log_prob(
        self, hidden: Tensor, groups: Tensor, slots: Tensor, counted: Tensor, with_hits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See TokenScorer.total_log_prob. Keeps nothing of N x S."""
        kernel = self._kernel(groups, slots, counted, product_dtype(hidden))
        total, hits = total_log_prob(kernel, (hidden, *self._parameters_of_kernel()), with_hits)
        return total, self._with_certain(hits, groups, counted)

    def _with_certain(self, hits: Tensor | None, groups: Tensor, counted: Tensor) -> Tensor | None:
        """``hits`` of a kernel, and the rows whose group has one token."""
        return None if hits is None else hits + (counted & (self.partition.sizes[groups] == 1)).sum()

    def target_log_prob(self, hidden: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
        """See TokenScorer.target_log_prob."""
        kernel = self._kernel(groups, slots, torch.ones_like(groups, dtype=torch.bool), product_dtype(hidden))
        return each_log_prob(kernel, (hidden, *self._parameters_of_kernel()))


class SortedTargets:
    """The rows that a scorer has to look at, sorted by group: those that count, in groups of more than one token.

    ``fixed``: all N rows, those that there is nothing to look at last, with the last group's index; ``counted`` says of
    each whether there is.
    """

    def __init__(
        self, partition: Partition, groups: Tensor, slots: Tensor, counted: Tensor, fixed: bool | None = None
    ) -> None:
        self.num_groups = len(partition.multi_groups)
        self.fixed = has_fixed_shapes(groups) if fixed is None else fixed
        index = partition.index_of(groups).masked_fill(~counted, -1)
        if self.fixed:
            keys = index.remainder(self.num_groups + 1).to(torch.int32)  # -1 comes last
            self.keys, self.rows = keys.sort(stable=True)
        else:
            kept = (index >= 0).nonzero().squeeze(-1)
            self.index, order = index[kept].sort(stable=True)
            self.rows = kept[order]
        self.slots = slots[self.rows]

    keys: Tensor  # of fixed ones: index, but M where there is nothing to look at

    @functools.cached_property
    def index(self) -> Tensor:
        """Of each row's group among the M."""
        return self.keys.clamp(max=max(0, self.num_groups - 1)).long()

    @functools.cached_property
    def counted(self) -> Tensor | None:
        """Whether there is something to look at; None where there always is."""
        return self.keys < self.num_groups if self.fixed else None

    def counted_in(self, part: slice) -> Tensor | None:
        """``counted`` of those rows; None where all are."""
        return None if self.counted is None else self.counted[part]

    def weights(self, part: slice, weights: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Of those rows, from ``weights`` [N] of all; None for 1 each."""
        some = None if weights is None else weights.index_select(0, self.rows[part]).to(dtype)
        return counted_weights(some, self.counted_in(part), dtype)

    def segments(self, part: slice) -> tuple[list[int], list[int]]:
        """The groups (their index) that have rows within ``part`` of the sorted rows, and how many each has."""
        numbers = torch.bincount(self.index[part], minlength=self.num_groups)
        found = numbers.nonzero().squeeze(-1)
        return found.tolist(), numbers[found].tolist()


class ScaleShiftKernel:
    """scale_g * (W_s h) + shift_g, then log softmax over the slots of g: inputs hidden [N, D], W_s [S, D], scale [M, S]
    and shift [M, S]. ScaleShiftScorer is the plain form."""

    def __init__(self, targets: SortedTargets, slot_exists: Tensor, dtype: torch.dtype) -> None:
        self.targets, self.slot_exists, self.dtype = targets, slot_exists, dtype

    def __call__(self, inputs: tuple[Tensor, ...], weights: Tensor | None, needs: list[bool], with_hits: bool) -> Rows:
        """See Kernel."""
        hidden, shared, scale, shift = inputs[:4]
        targets = self.targets
        shared_cast = shared.to(self.dtype)
        log_prob = hidden.new_zeros(len(hidden), dtype=sum_dtype(self.dtype))
        scale = scale.to(log_prob.dtype)
        masked_shift = shift.to(log_prob.dtype).masked_fill(~self.slot_exists, -torch.inf)
        hits = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device) if with_hits else None
        gradients = zero_gradients(inputs) if any(needs) else []
        if len(scale) == 0:
            return Rows(log_prob, hits, list(gradients) if gradients else [None] * len(inputs))
        for part in chunks(len(targets.rows), self._num_choices(inputs), targets.fixed):
            rows, groups, slots = targets.rows[part], targets.index[part], targets.slots[part]
            some = hidden.index_select(0, rows).to(self.dtype)
            product = (some @ shared_cast.t()).to(log_prob.dtype)
            some_scale = scale.index_select(0, groups)
            logits = masked_shift.index_select(0, groups).addcmul_(some_scale, product)
            low = self._correct(logits, some, part, inputs)
            counted = targets.counted_in(part)
            if hits is not None:
                hits[rows] = only_counted(logits.argmax(dim=-1) == slots, counted)
            some_weights = targets.weights(part, weights, log_prob.dtype)
            chosen, slope = log_prob_and_slope(logits, slots, some_weights, bool(gradients))
            log_prob.index_copy_(0, rows, only_counted(chosen, counted))
            if slope is not None:
                gradients[3].index_add_(0, groups, slope)
                gradients[2].index_add_(0, groups, product.mul_(slope))
                grad_product = some_scale.mul_(slope).to(self.dtype)
                add_product(gradients[1], grad_product.t(), some)
                grad_some = grad_product @ shared_cast
                self._correct_gradients(low, slope, some, grad_some, part, inputs, gradients)
                gradients[0].index_copy_(0, rows, grad_some.to(hidden.dtype))
        return Rows(log_prob, hits, list(gradients) if gradients else [None] * len(inputs))

    def _num_choices(self, inputs: tuple[Tensor, ...]) -> int:
        """Numbers that are held for each row."""
        return len(inputs[1])

    def _correct(self, logits: Tensor, some: Tensor, part: slice, inputs: tuple[Tensor, ...]) -> Tensor | None:
        """Add to the logits of sorted rows ``part`` what a kernel has beyond scale and shift."""
        return None

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
        """Add that part's gradients; ``low`` is what _correct returned."""


class ScaleShiftScorer(TokenScorer):
    """scale_g * (W_s h) + shift_g: one shared product and 2 M S numbers (arXiv 2411.06371, its fast form), by autograd.

    The shared W_s [S, D] starts as normal(0, ``init_std``), scales as 1, shifts as 0.
    """

    capturable = True

    def __init__(self, hidden_size: int, partition: Partition, init_std: float = 0.02) -> None:
        super().__init__(partition)
        num_groups, num_slots = len(partition.multi_groups), partition.num_slots
        self.shared = nn.Parameter(torch.empty(num_slots, hidden_size))
        nn.init.normal_(self.shared, std=init_std)
        self.scale = nn.Parameter(torch.ones(num_groups, num_slots))
        self.shift = nn.Parameter(torch.zeros(num_groups, num_slots))

    @torch.no_grad()
    def start_from(self, log_frequency: Tensor) -> None:
        """See TokenScorer.start_from."""
        self.shift[self.partition.multi_slot_exists] = log_frequency[self.partition.multi_tokens].to(self.shift.dtype)

    def _masked_shift(self) -> Tensor:
        # Masking the [M, S] parameter instead of the [N, S] logits costs nothing that grows with N.
        return self.shift.masked_fill(~self.partition.multi_slot_exists, -torch.inf)

    def target_log_prob(self, hidden: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
        """See TokenScorer.target_log_prob. As the paper has it, scale and shift [N, S] are looked up for each row."""
        if len(self.partition.multi_groups) < len(self.partition.sizes) or self.softcap is not None:
            return super().target_log_prob(hidden, groups, slots)
        scale, shift = F.embedding(groups, self.scale), F.embedding(groups, self._masked_shift())
        logits = torch.addcmul(shift, scale, F.linear(hidden, self.shared).to(scale.dtype))
        return -F.cross_entropy(logits, slots, reduction="none")

    def _slot_log_prob(self, hidden: Tensor, index: Tensor) -> Tensor:
        return self._log_softmax(self._slot_logits(hidden, index))

    def _slot_logits(self, hidden: Tensor, index: Tensor) -> Tensor:
        shift = self.shift[index].masked_fill(~self.partition.exists_in(index), -torch.inf)
        return torch.addcmul(shift, self.scale[index], F.linear(hidden, self.shared).unsqueeze(1).to(shift.dtype))

    def _all_log_prob(self, hidden: Tensor) -> Tensor:
        shared = F.linear(hidden, self.shared).unsqueeze(1)
        log_prob = self._log_softmax(self.scale * shared + self._masked_shift())
        return log_prob[:, self.partition.multi_slot_exists]

    def _target_logit(self, hidden: Tensor, index: Tensor, slots: Tensor) -> Tensor:
        shared = rowwise_product(hidden, F.embedding(slots, self.shared))
        return self.scale[index, slots] * shared + self.shift[index, slots]


class SortedScaleShiftScorer(FastTokenScorer, ScaleShiftScorer):
    """The same numbers with gradients computed in the forward pass, a chunk of rows at a time."""

    kernel_type = ScaleShiftKernel

    def _kernel(self, groups: Tensor, slots: Tensor, counted: Tensor, dtype: torch.dtype) -> Kernel:
        targets = SortedTargets(self.partition, groups, slots, counted)
        return self.kernel_type(targets, self.partition.multi_slot_exists, dtype)

    def _parameters_of_kernel(self) -> tuple[Tensor, ...]:
        return self.shared, self.scale, self.shift
