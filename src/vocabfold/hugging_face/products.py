"""Products of a layer's weights with a few states: torch's own numbers, read from memory faster.

``F.linear`` computes a few float32 states on one thread (MKL), and in bfloat16 lays the weights out anew at each call
(oneDNN). Here float32 rows are shared among the threads, each row's sum untouched, and bfloat16 rows are laid out once,
in a copy, for the same instructions. Whether the bits are the same is for the caller to see: ``steps`` compares them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Product = Callable[[Tensor], Tensor]
MOST_STATES = 64  # beyond, F.linear is as fast


def same_product(weight: Tensor, bias: Tensor | None = None) -> Product:
    """``weight`` [N, D], ``bias`` [N] -> a function of states [B, D] that gives ``F.linear`` of them."""
    try:
        if bias is None and weight.dtype == torch.bfloat16:
            return _packed(weight)
        if bias is None and weight.dtype == torch.float32 and weight.is_contiguous():
            return _shared(weight)
    except (AttributeError, RuntimeError, NotImplementedError):
        pass  # a torch without this instruction, or a processor
    return lambda states: F.linear(states, weight, bias)


def _packed(weight: Tensor) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
    multiply = torch.ops.mkldnn._linear_pointwise

    def product(states: Tensor) -> Tensor:
        if len(states) > MOST_STATES:
            return F.linear(states, weight)
        result: Tensor = multiply(states, packed, None, "none", [], "")
        return result

    return product


def _shared(weight: Tensor) -> Product:
    def product(states: Tensor) -> Tensor:
        parts, batch = torch.get_num_threads(), len(states)
        if parts == 1 or len(weight) % parts or batch > MOST_STATES:
            return F.linear(states, weight)
        rows = weight.view(parts, -1, weight.shape[1]).transpose(1, 2)
        return torch.bmm(states.expand(parts, -1, -1), rows).transpose(0, 1).reshape(batch, -1)

    return product
