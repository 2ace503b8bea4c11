"""The kernel of one linear layer a group on a CPU: rows sorted by group, a product for each group that has some."""

from __future__ import annotations

import torch
from torch import Tensor

from vocabfold.heads.kernels import (
    Late,
    Rows,
    add_product,
    chunks,
    log_prob_and_slope,
    sum_dtype,
)
from vocabfold.heads.partition import Partition
from vocabfold.heads.scorers import SortedTargets
from vocabfold.heads.views import View, ViewPass


class LinearKernel:
    """log softmax(W_g h + b_g): inputs hidden [N, D], W [V or as many as the bias, D] and b. linear.LoopedLinearScorer
    is the plain form.

    The gradient of W is Late where the slopes [N, S] that it is made of are smaller: a dense gradient of the embedding
    would lie beside all activations of the model below. With a ``view`` W_g is applied to what it makes of hidden, D
    numbers too, and its parameters are the last inputs.
    """

    def __init__(
        self,
        partition: Partition,
        targets: SortedTargets,
        tied: bool,
        dtype: torch.dtype,
        view: View | None = None,
    ) -> None:
        self.partition, self.targets, self.tied, self.dtype, self.view = partition, targets, tied, dtype, view
        # Rows that follow each other are read, and their gradient is written, where they lie.
        self.first_row = partition.first_multi_token if tied else 0

    def __call__(self, inputs: tuple[Tensor, ...], weights: Tensor | None, needs: list[bool], with_hits: bool) -> Rows:
        """See Kernel."""
        viewed = ViewPass(self.view, inputs, any(needs))
        hidden, weight, bias = viewed.inputs
        targets = self.targets
        exists = self.partition.multi_slot_exists
        # Places, not a mask: how many a mask picks depends on values, which a simulation of memory does not have.
        places = exists.flatten().nonzero().squeeze(-1)
        log_prob = hidden.new_zeros(len(hidden), dtype=sum_dtype(self.dtype))
        padded_bias = torch.full_like(exists, -torch.inf, dtype=log_prob.dtype)
        padded_bias.view(-1).index_copy_(0, places, bias.to(log_prob.dtype))
        hits = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device) if with_hits else None
        wanted = any(needs)
        grad_hidden = torch.zeros_like(hidden) if wanted else None
        grad_bias = torch.zeros_like(padded_bias) if wanted else None
        # A tied weight that is frozen, as when only the groups are learned, costs no gradient.
        grad_weight = slopes = read = None
        if needs[1]:
            num_rows, num_slots = len(targets.rows), padded_bias.shape[1]
            if weights is None and num_rows * (num_slots + hidden.shape[1]) < weight.numel():
                slopes = hidden.new_empty(num_rows, num_slots, dtype=self.dtype)
                read = None if self.view is None else hidden.new_empty(num_rows, hidden.shape[1], dtype=self.dtype)
            else:
                grad_weight = torch.zeros_like(weight, dtype=sum_dtype(weight.dtype))
        for part in chunks(len(targets.rows), padded_bias.shape[1]):
            rows, groups, slots = targets.rows[part], targets.index[part], targets.slots[part]
            some = viewed.read(hidden.index_select(0, rows), rows).to(self.dtype)
            if read is not None:
                read[part] = some
            logits = padded_bias.index_select(0, groups)
            found, numbers = targets.segments(part)
            pieces = some.split(numbers)
            for group, piece, of_group in zip(found, pieces, logits.split(numbers), strict=True):
                group_rows = self._rows(weight, group)
                add_product(_first_columns(of_group, len(group_rows)), piece, group_rows.t())
            if hits is not None:
                hits[rows] = logits.argmax(dim=-1) == slots
            some_weights = None if weights is None else weights.index_select(0, rows).to(log_prob.dtype)
            chosen, slope = log_prob_and_slope(logits, slots, some_weights, wanted)
            log_prob.index_copy_(0, rows, chosen)
            if slope is None or grad_hidden is None or grad_bias is None:
                continue
            grad_bias.index_add_(0, groups, slope)
            slope = slope.to(self.dtype)
            grad_some = torch.empty_like(some)
            for group, of_group, result in zip(found, slope.split(numbers), grad_some.split(numbers), strict=True):
                group_rows = self._rows(weight, group)
                torch.mm(_first_columns(of_group, len(group_rows)), group_rows, out=result)
            grad_hidden.index_copy_(0, rows, viewed.back(grad_some).to(hidden.dtype))
            if slopes is not None:
                slopes[part] = slope
            if grad_weight is not None:
                for group, of_group, piece in zip(found, slope.split(numbers), pieces, strict=True):
                    self._add_to_rows(grad_weight, group, of_group, piece)
        late = None
        if slopes is not None:
            late = Late((hidden.detach() if read is None else read, weight.detach(), slopes), self._grad_weight)
        if grad_bias is not None:
            grad_bias = grad_bias.flatten().index_select(0, places)
        if not wanted:
            return Rows(log_prob, hits, [None] * len(needs))
        return Rows(log_prob, hits, [grad_hidden, late or grad_weight, grad_bias, *viewed.gradients])

    def _rows(self, weight: Tensor, group: int) -> Tensor:
        start, stop = self.partition.multi_bounds[group : group + 2]
        if self.first_row is not None:
            return weight.narrow(0, self.first_row + start, stop - start).to(self.dtype)
        return weight.index_select(0, self.partition.multi_tokens[start:stop]).to(self.dtype)

    def _add_to_rows(self, grad_weight: Tensor, group: int, slope: Tensor, some: Tensor) -> None:
        """Add ``slope`` [R, S] transposed times ``some`` [R, D] to the rows of ``group``."""
        start, stop = self.partition.multi_bounds[group : group + 2]
        slope = _first_columns(slope, stop - start).t()
        if self.first_row is not None:
            add_product(grad_weight.narrow(0, self.first_row + start, stop - start), slope, some)
        else:
            product = (slope @ some).to(grad_weight.dtype)
            grad_weight.index_add_(0, self.partition.multi_tokens[start:stop], product)

    def _grad_weight(self, factor: Tensor, hidden: Tensor, weight: Tensor, slopes: Tensor) -> Tensor:
        """``factor`` times the gradient of W, from ``slopes`` [rows of the targets, S]; ``hidden`` [N, D], or what a
        view made of the rows of the targets."""
        dtype = sum_dtype(weight.dtype)
        grad_weight = torch.empty_like(weight, dtype=dtype)
        if self.first_row is None:
            grad_weight.zero_()
        some = hidden if self.view is not None else hidden.index_select(0, self.targets.rows).to(self.dtype)
        found, numbers = self.targets.segments(slice(None))
        written = 0
        for group, slope, piece in zip(found, slopes.split(numbers), some.split(numbers), strict=True):
            start, stop = self.partition.multi_bounds[group : group + 2]
            product = (_first_columns(slope, stop - start).t() @ piece).to(dtype)
            if self.first_row is None:
                grad_weight.index_copy_(0, self.partition.multi_tokens[start:stop], product.mul_(factor))
                continue
            # Most groups are written whole, so only what lies between those of the batch has to be cleared.
            start, stop = self.first_row + start, self.first_row + stop
            grad_weight[written:start].zero_()
            torch.mul(product, factor, out=grad_weight[start:stop])
            written = stop
        if self.first_row is not None:
            grad_weight[written:].zero_()
        return grad_weight


def _first_columns(matrix: Tensor, number: int) -> Tensor:
    return matrix if matrix.shape[1] == number else matrix.narrow(1, 0, number)
