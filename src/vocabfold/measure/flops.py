"""Floating point operations of a step: torch's own counter, two per multiply-accumulate.

Counted are matrix products, convolutions and attention products, forward and backward. Not counted are
scalars, elementwise work, reductions, softmax, normalisation, lookups and the optimizer. Attention counts the
whole T x T square, even where a causal mask hides half of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from vocabfold.errors import UserError

Shape = Sequence[int]


def _attention_forward(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    batch_heads, queries = math.prod(query[:-2]), query[-2]
    return 2 * batch_heads * queries * key[-2] * (query[-1] + value[-1])


def _attention_backward(_grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    # Scores again, then the gradients of query and key (size of query) and of weights and value (size of value).
    batch_heads, queries = math.prod(query[:-2]), query[-2]
    return 2 * batch_heads * queries * key[-2] * (3 * query[-1] + 2 * value[-1])


def _matrix_vector(matrix: Shape, _vector: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _add_matrix_vector(_bias: Shape, matrix: Shape, _vector: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _dot(first: Shape, _second: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(first)


def _add_product_in_place(_total: Shape, first: Shape, second: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(first) * second[-1]


# What torch's counter does not know: attention as a CPU runs it, products with a vector, and products added in place.
_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.addmm_: _add_product_in_place,
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.addmv: _add_matrix_vector,
    torch.ops.aten.dot: _dot,
}


def count_flops_by_operator(run: Callable[[], Any]) -> dict[str, int]:
    """Floating point operations of one call of `run`, forward and backward, by the name of torch's operator."""
    unknown_to_torch = {operator: formula for operator, formula in _FORMULAS.items() if operator not in flop_registry}
    counter = FlopCounterMode(display=False, custom_mapping=unknown_to_torch)
    with counter:
        run()
    return {str(operator): flops for operator, flops in counter.get_flop_counts().get("Global", {}).items()}


def count_flops(run: Callable[[], Any]) -> int:
    """Floating point operations of one call of `run`, forward and backward, as the module's first lines define them."""
    return sum(count_flops_by_operator(run).values())


def training_flops_per_token(step: Callable[[], Any], num_tokens: int) -> float:
    """`count_flops` of one training step over `num_tokens` = N tokens, per token."""
    if num_tokens < 1:
        raise UserError(f"flops per token need at least one token in the step, got {num_tokens}")
    return count_flops(step) / num_tokens


def flops_without_trace(step: Callable[[], Any], num_tokens: int, model: nn.Module, device: torch.device) -> float:
    """`training_flops_per_token`, after which the buffers of `model` and the random state are as they were before."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # batch norm's running means
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        flops = training_flops_per_token(step, num_tokens)
    for buffer, value in buffers:
        buffer.copy_(value)
    return flops
