"""Sums of log-probabilities whose gradients are computed on the way forward, a few rows at a time.

A softmax over C choices then keeps its gradients, as large as its inputs, instead of logits of N x C, and never
holds more than a chunk of those.

On a CPU rows that do not count are left out. On CUDA asking which they are would make the host wait for the device,
and a CUDA graph has fixed shapes: there all rows are computed, those that do not count with weight 0
(``has_fixed_shapes``).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable without importing the compiler, a second
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

CHUNK_ELEMENTS = 1 << 18  # logits at a time: 1 MiB in fp32, so that a CPU's cache holds what is made of them
FEWEST_ROWS = 128  # below that a matrix product is slow
FIXED_CHUNK_ELEMENTS = 1 << 26  # the same on a device whose launches cost more than its memory
FIXED_DEVICES = ("cuda",)  # where shapes are fixed and the host waits for nothing
TRITON_DEVICES = ("cuda",)  # where Triton's kernels run, if it is installed


@dataclass
class Late:
    """A gradient that waits for the end of the backward pass, when the activations of the model below are gone:
    ``compute(factor, *tensors)`` makes it, ``factor`` (a number) times the gradient of the sum of log P."""

    tensors: tuple[Tensor, ...]
    compute: Callable[..., Tensor]


@dataclass
class Rows:
    """log P of each row's target [N] (0 where none counts), whether it is the likeliest choice [N] (where asked for),
    and the gradients of the weighted sum of log P by each input (None where not wanted; Late only of an unweighted
    sum)."""

    log_prob: Tensor
    hits: Tensor | None
    gradients: list[Tensor | Late | None]


class Kernel(Protocol):
    """Does the work of both functions below, on inputs that autograd tracks: hidden [N, D], then parameters."""

    def __call__(self, inputs: tuple[Tensor, ...], weights: Tensor | None, needs: list[bool], with_hits: bool) -> Rows:
        """``weights`` [N] of the rows in the sum, None for 1 each; ``needs``: which inputs want a gradient."""


@_disable_dynamo  # loops over as many groups as a batch happens to hold: nothing a compiled graph could keep
def total_log_prob(kernel: Kernel, inputs: tuple[Tensor, ...], with_hits: bool) -> tuple[Tensor, Tensor | None]:
    """(sum of log P over the rows, how many are the likeliest choice); gradients are ready when it returns.

    Saved gradients belong to the sum: backward multiplies them by what comes in, so that a loss may be scaled for fp16
    after the fact. They are freed by the first backward pass, or copied if the graph is retained. A Late gradient is
    computed by a node of its own, which the engine runs when no other is ready.
    """
    needs = [tensor.requires_grad and torch.is_grad_enabled() for tensor in inputs]
    late: dict[int, Late] = {}
    total, hits = _Total.apply(kernel, needs, with_hits, late, *inputs)
    for index, gradient in late.items():
        nothing = _AddsNothing.apply(gradient, total.dtype, inputs[index])
        # Of the nodes that are ready the engine takes the one with the highest number. This decides on memory alone.
        nothing.grad_fn._set_sequence_nr(0)
        total = total + nothing
    return total, hits


@_disable_dynamo
def each_log_prob(kernel: Kernel, inputs: tuple[Tensor, ...]) -> Tensor:
    """log P of each row [N]. Only with what comes back are the rows' weights known: backward computes all again."""
    log_prob: Tensor = _Each.apply(kernel, *inputs)
    return log_prob


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, needs: list[bool], with_hits: bool, late: dict[int, Late], *inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(inputs[0].device.type, enabled=False):
            rows = kernel(inputs, None, needs, with_hits)
        late.update({i: gradient for i, gradient in enumerate(rows.gradients) if isinstance(gradient, Late)})
        ctx.save_for_backward(*(None if isinstance(gradient, Late) else gradient for gradient in rows.gradients))
        hits = None if rows.hits is None else rows.hits.sum()
        if hits is not None:
            ctx.mark_non_differentiable(hits)
        return rows.log_prob.sum(), hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        # In place where the graph ends here: a copy would be one more gradient of the size of the embedding.
        in_place = not torch._C._autograd._get_current_graph_task_keep_graph()
        return None, None, None, None, *(_scaled(gradient, grad_total, in_place) for gradient in ctx.saved_tensors)


class _AddsNothing(torch.autograd.Function):
    """0, with the gradient that a Late makes."""

    @staticmethod
    def forward(ctx: Any, late: Late, dtype: torch.dtype, parameter: Tensor) -> Tensor:
        ctx.compute = late.compute
        ctx.save_for_backward(*late.tensors)
        return parameter.new_zeros((), dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_total.device.type, enabled=False):
            return None, None, ctx.compute(grad_total, *ctx.saved_tensors)


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


def has_fixed_shapes(tensor: Tensor) -> bool:
    """Whether what is computed where ``tensor`` lies must have shapes, and an order of launches, that depend on no
    value: see above. Not while torch counts operations: its counter knows no kernel of Triton's, and would count what
    pads the blocks of products."""
    return tensor.device.type in FIXED_DEVICES and not any(
        type(mode).__module__ == "torch.utils.flop_counter" for mode in _get_current_dispatch_mode_stack()
    )


def triton_kernels(dtype: torch.dtype, inputs: tuple[Tensor, ...]) -> ModuleType | None:
    """The module of that name, where it can compute products of ``dtype`` from ``inputs``; None where it cannot."""
    device = inputs[0].device
    if device.type not in TRITON_DEVICES or any(tensor.dtype == torch.float64 for tensor in inputs):
        return None
    module = _triton_kernels(device)
    return module if module is not None and dtype in module.DTYPES else None


@functools.cache
def _triton_kernels(device: torch.device) -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):  # no bfloat16 before
        return None
    return importlib.import_module("vocabfold.heads.triton_kernels")


def chunks(num_rows: int, num_choices: int, fixed: bool = False) -> Iterator[slice]:
    """Slices of so many rows that their logits stay within CHUNK_ELEMENTS; ``fixed``: within FIXED_CHUNK_ELEMENTS."""
    elements = FIXED_CHUNK_ELEMENTS if fixed else CHUNK_ELEMENTS
    size = max(FEWEST_ROWS, elements // max(1, num_choices))
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
    weight x ((is it the target) - P), which may take the place of the logits."""
    module = triton_kernels(logits.dtype, (logits,))
    if module is not None and logits.shape[1] <= module.MOST_COLUMNS and logits.is_contiguous():
        slope = logits if with_slope else None
        log_prob: Tensor = module.softmax_of_rows(logits, None, targets, weights, slope, False)[0]
        return log_prob, slope
    column = targets.unsqueeze(-1)
    if not with_slope:
        return logits.log_softmax(dim=-1).gather(-1, column).squeeze(-1), None
    # One exponential for each choice, not two: log P = logit - largest + log(its P), which is never below 1 / C.
    chosen = logits.gather(-1, column) - logits.amax(dim=-1, keepdim=True)
    slope = logits.softmax(dim=-1)
    chosen += slope.amax(dim=-1, keepdim=True).log_()
    slope.neg_().scatter_add_(-1, column, torch.ones_like(chosen))
    if weights is not None:
        slope.mul_(weights.unsqueeze(-1))
    return chosen.squeeze(-1), slope


def counted_weights(weights: Tensor | None, counted: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``weights`` [R] (None: 1 each) where a row is ``counted`` [R] (None: each), 0 elsewhere."""
    if counted is None:
        return weights
    return counted.to(dtype) if weights is None else weights.masked_fill(~counted, 0.0)


def only_counted(values: Tensor, counted: Tensor | None) -> Tensor:
    """``values`` [R] where a row is ``counted`` [R] (None: each), 0 elsewhere."""
    return values if counted is None else values.masked_fill(~counted, 0)
