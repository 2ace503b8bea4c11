"""The kernel of one softmax over rows that all hidden states share, as over the groups."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from vocabfold.heads.kernels import (
    Rows,
    add_product,
    chunks,
    counted_weights,
    has_fixed_shapes,
    log_prob_and_slope,
    only_counted,
    sum_dtype,
    triton_kernels,
)
from vocabfold.heads.views import View, ViewPass


class SoftmaxKernel:
    """log softmax(W h + b) of a target: inputs hidden [N, D], W [C, D] and, where there is one, b [C]. The plain form,
    with logits of [N, C]:

    F.cross_entropy(F.linear(hidden, W, b), targets, reduction="none")

    With a ``view`` W is applied to what it makes of hidden, and its parameters are the last inputs.
    """

    def __init__(self, targets: Tensor, counted: Tensor, dtype: torch.dtype, view: View | None = None) -> None:
        self.targets, self.counted, self.dtype, self.view = targets, counted, dtype, view

    def __call__(self, inputs: tuple[Tensor, ...], weights: Tensor | None, needs: list[bool], with_hits: bool) -> Rows:
        """See Kernel."""
        fixed = has_fixed_shapes(inputs[0])
        module = triton_kernels(self.dtype, inputs) if fixed and self.view is None else None
        if module is not None and len(inputs[1]) <= module.MOST_COLUMNS:
            return self._fused(module, inputs, weights, needs, with_hits)
        viewed = ViewPass(self.view, inputs, any(needs))
        hidden, weight, *biases = viewed.inputs
        rows_of_weight = weight.to(self.dtype)
        log_prob = hidden.new_zeros(len(hidden), dtype=sum_dtype(self.dtype))
        hits = torch.zeros_like(self.counted) if with_hits else None
        grad_hidden = torch.zeros_like(hidden) if any(needs) else None
        grad_weight = torch.zeros_like(weight, dtype=log_prob.dtype) if any(needs) else None
        grad_biases = [torch.zeros_like(bias, dtype=log_prob.dtype) for bias in biases]
        kept = hidden if fixed else self.counted.nonzero().squeeze(-1)
        for part in chunks(len(kept), len(weight), fixed):
            # A row that does not count costs nothing; where all count, nothing is copied.
            rows = part if len(kept) == len(hidden) else kept[part]
            some, targets = viewed.read(hidden[rows], rows).to(self.dtype), self.targets[rows]
            logits = (some @ rows_of_weight.t()).to(log_prob.dtype)
            for bias in biases:
                logits += bias
            counted = self.counted[rows] if fixed else None
            if hits is not None:
                hits[rows] = only_counted(logits.argmax(dim=-1) == targets, counted)
            some_weights = None if weights is None else weights[rows].to(log_prob.dtype)
            some_weights = counted_weights(some_weights, counted, log_prob.dtype)
            chosen, slope = log_prob_and_slope(logits, targets, some_weights, grad_hidden is not None)
            log_prob[rows] = only_counted(chosen, counted)
            if slope is not None and grad_hidden is not None and grad_weight is not None:
                for grad_bias in grad_biases:
                    grad_bias += slope.sum(dim=0)
                slope = slope.to(self.dtype)
                grad_hidden[rows] = viewed.back(slope @ rows_of_weight).to(grad_hidden.dtype)
                add_product(grad_weight, slope.t(), some)
        if not any(needs):
            return Rows(log_prob, hits, [None] * len(needs))
        return Rows(log_prob, hits, [grad_hidden, grad_weight, *grad_biases, *viewed.gradients])

    def _fused(
        self,
        module: ModuleType,
        inputs: tuple[Tensor, ...],
        weights: Tensor | None,
        needs: list[bool],
        with_hits: bool,
    ) -> Rows:
        """The same with all that lies between the products in one launch."""
        hidden, weight, *biases = inputs
        some, rows_of_weight = hidden.to(self.dtype), weight.to(self.dtype)
        wanted, dtype = any(needs), sum_dtype(self.dtype)
        parts: list[tuple[Tensor, Tensor | None]] = []
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if wanted else None
        grad_biases = [torch.zeros_like(bias, dtype=dtype) if wanted else None for bias in biases]
        for part in chunks(len(hidden), len(weight), fixed=True):
            slope = some[part] @ rows_of_weight.t()
            some_weights = counted_weights(None if weights is None else weights[part], self.counted[part], dtype)
            bias = biases[0] if biases else None
            slopes = slope if wanted else None
            parts.append(module.softmax_of_rows(slope, bias, self.targets[part], some_weights, slopes, with_hits))
            if grad_hidden is None or grad_weight is None:
                continue
            for grad_bias in grad_biases:
                if grad_bias is not None:
                    grad_bias += slope.sum(dim=0, dtype=dtype)
            grad_hidden[part] = slope @ rows_of_weight
            add_product(grad_weight, slope.t(), some[part])
        log_prob = torch.cat([found for found, _ in parts]) if parts else hidden.new_zeros(0, dtype=dtype)
        hits = None
        if with_hits:
            hits = torch.cat([found for _, found in parts if found is not None]) if parts else self.counted
        return Rows(log_prob, hits, [grad_hidden, grad_weight, *grad_biases])
