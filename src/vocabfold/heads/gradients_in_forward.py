"""Sums of log-probabilities whose gradients are computed on the way forward, a few rows at a time.

A softmax over C choices then keeps its gradients, as large as its inputs, instead of logits of N x C, and never
holds more than a chunk of those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 18  # logits at a time: 1 MiB in fp32, so that a CPU's cache holds what is made of them
FEWEST_ROWS = 128  # below that a matrix product is slow


@dataclass
class Rows:
    """log P of each row's target [N] (0 where none counts), whether it is the likeliest choice [N] (where asked for),
    and the gradients of the weighted sum of log P by each input (None where not wanted)."""

    log_prob: Tensor
    hits: Tensor | None
    gradients: list[Tensor | None]


class Kernel(Protocol):
    """Does the work of both functions below, on inputs that autograd tracks: hidden [N, D], then parameters."""

    def __call__(self, inputs: tuple[Tensor, ...], weights: Tensor | None, needs: list[bool], with_hits: bool) -> Rows:
        """``weights`` [N] of the rows in the sum, None for 1 each; ``needs``: which inputs want a gradient."""


@torch.compiler.disable  # loops over as many groups as a batch happens to hold: nothing a compiled graph could keep
def total_log_prob(kernel: Kernel, inputs: tuple[Tensor, ...], with_hits: bool) -> tuple[Tensor, Tensor | None]:
    """(sum of log P over the rows, how many are the likeliest choice); gradients are ready when it returns.

    Saved gradients belong to the sum: backward multiplies them by what comes in, so that a loss may be scaled for fp16
    after the fact. They are freed by the first backward pass, or copied if the graph is retained.
    """
    needs = [tensor.requires_grad and torch.is_grad_enabled() for tensor in inputs]
    total, hits = _Total.apply(kernel, needs, with_hits, *inputs)
    return total, hits


@torch.compiler.disable
def each_log_prob(kernel: Kernel, inputs: tuple[Tensor, ...]) -> Tensor:
    """log P of each row [N]. Only with what comes back are the rows' weights known: backward computes all again."""
    log_prob: Tensor = _Each.apply(kernel, *inputs)
    return log_prob


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, needs: list[bool], with_hits: bool, *inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(inputs[0].device.type, enabled=False):
            rows = kernel(inputs, None, needs, with_hits)
        ctx.save_for_backward(*rows.gradients)
        hits = None if rows.hits is None else rows.hits.sum()
        if hits is not None:
            ctx.mark_non_differentiable(hits)
        return rows.log_prob.sum(), hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        # In place where the graph ends here: a copy would be one more gradient of the size of the embedding.
        in_place = not torch._C._autograd._get_current_graph_task_keep_graph()
        return None, None, None, *(_scaled(gradient, grad_total, in_place) for gradient in ctx.saved_tensors)


def _scaled(gradient: Tensor | None, factor: Tensor, in_place: bool) -> Tensor | None:
    if gradient is None:
        return None
    if gradient.dtype in (torch.float16, torch.bfloat16):  # a half would round the factor before it multiplies
        return gradient.float().mul_(factor).to(gradient.dtype)
    return gradient.mul_(factor) if in_place else gradient * factor


class _Each(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, *inputs: Tensor) -> Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(*inputs)
        with torch.autocast(inputs[0].device.type, enabled=False):
            return kernel(inputs, None, [False] * len(inputs), False).log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        with torch.autocast(inputs[0].device.type, enabled=False):
            rows = ctx.kernel(inputs, grad_rows, list(ctx.needs_input_grad[1:]), False)
        return None, *rows.gradients


def product_dtype(hidden: Tensor) -> torch.dtype:
    """What matrix products run in: autocast's choice where it is on, else the dtype of ``hidden``."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits, log-probabilities and sums over rows are held in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def zero_gradients(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Room for the gradient of hidden, in its dtype, and of the parameters, in float32 at least: they are sums."""
    hidden, *parameters = inputs
    return [torch.zeros_like(hidden), *(torch.zeros_like(p, dtype=sum_dtype(p.dtype)) for p in parameters)]


def chunks(num_rows: int, num_choices: int) -> Iterator[slice]:
    """Slices of so many rows that their logits stay within CHUNK_ELEMENTS."""
    size = max(FEWEST_ROWS, CHUNK_ELEMENTS // max(1, num_choices))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """``total`` [A, B] += first [A, C] second [C, B], in place and without a temporary where the dtypes agree."""
    if total.dtype == first.dtype:
        total.addmm_(first, second)
    else:
        total += first @ second


def log_prob_and_slope(
    logits: Tensor, targets: Tensor, weights: Tensor | None, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """``logits`` [R, C], ``targets`` [R] -> log P(target) [R], and the slope [R, C] of the sum of weights x log P:
    weight x ((is it the target) - P)."""
    log_prob = logits.log_softmax(dim=-1)
    column = targets.unsqueeze(-1)
    chosen = log_prob.gather(-1, column)
    if not with_slope:
        return chosen.squeeze(-1), None
    slope = log_prob.exp_().neg_()
    slope.scatter_add_(-1, column, torch.ones_like(chosen))
    if weights is not None:
        slope.mul_(weights.unsqueeze(-1))
    return chosen.squeeze(-1), slope


class SoftmaxKernel:
    """log softmax(W h) of a target: inputs hidden [N, D] and W [C, D]. The plain form, with logits of [N, C]:

    F.cross_entropy(F.linear(hidden, W), targets, reduction="none")
    """

    def __init__(self, targets: Tensor, counted: Tensor, dtype: torch.dtype) -> None:
        self.targets, self.counted, self.dtype = targets, counted, dtype

    def __call__(self, inputs: tuple[Tensor, ...], weights: Tensor | None, needs: list[bool], with_hits: bool) -> Rows:
        """See Kernel."""
        hidden, weight = inputs
        rows_of_weight = weight.to(self.dtype)
        log_prob = hidden.new_zeros(len(hidden), dtype=sum_dtype(self.dtype))
        hits = torch.zeros_like(self.counted) if with_hits else None
        grad_hidden = torch.empty_like(hidden) if any(needs) else None
        grad_weight = torch.zeros_like(weight, dtype=log_prob.dtype) if any(needs) else None
        of_rows = self.counted.to(log_prob.dtype)
        if weights is not None:
            of_rows = torch.where(self.counted, weights.to(log_prob.dtype), 0.0)
        for part in chunks(len(hidden), len(weight)):
            some = hidden[part].to(self.dtype)
            logits = (some @ rows_of_weight.t()).to(log_prob.dtype)
            targets = self.targets[part]
            if hits is not None:
                hits[part] = (logits.argmax(dim=-1) == targets) & self.counted[part]
            chosen, slope = log_prob_and_slope(logits, targets, of_rows[part], grad_hidden is not None)
            log_prob[part] = torch.where(self.counted[part], chosen, 0.0)
            if slope is not None and grad_hidden is not None and grad_weight is not None:
                slope = slope.to(self.dtype)
                grad_hidden[part] = slope @ rows_of_weight
                add_product(grad_weight, slope.t(), some)
        return Rows(log_prob, hits, [grad_hidden, grad_weight])
