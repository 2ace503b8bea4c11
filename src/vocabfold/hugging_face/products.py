"""Products of a layer's weights with a few states: torch's own numbers, read from memory faster.

``F.linear`` computes one float32 state on one thread (MKL), and in bfloat16 lays the weights out anew at each call
(oneDNN). Here float32 rows are shared among the threads, each row's sum untouched, and bfloat16 rows are laid out once,
in a copy, for the same instructions. Neither library promises the same bits, so each size of weights and number of
states is compared with ``F.linear`` before its first use, on random states, and left to it where one bit differs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Product = Callable[[Tensor], Tensor]
MOST_STATES = 64  # beyond, F.linear is as fast
NUM_TRIALS = 4

_has_same_bits: dict[tuple[object, ...], bool] = {}


def same_product(weight: Tensor, bias: Tensor | None = None) -> Product:
    """``weight`` [N, D], ``bias`` [N] -> a function of states [B, D] that gives the bits of ``F.linear``."""
    weight = weight.detach()
    build = {torch.float32: _shared, torch.bfloat16: _packed}.get(weight.dtype)

    def plain(states: Tensor) -> Tensor:
        return F.linear(states, weight, bias)

    if build is None or bias is not None or not weight.is_contiguous():
        return plain
    try:
        faster = build(weight)
    except (AttributeError, RuntimeError, NotImplementedError):  # a torch or a processor without the instruction
        return plain

    def product(states: Tensor) -> Tensor:
        batch = len(states)
        if batch > MOST_STATES:
            return plain(states)
        kind = (weight.dtype, weight.shape, batch, torch.get_num_threads())
        if kind not in _has_same_bits:
            _has_same_bits[kind] = _is_same(faster, plain, states)
        return faster(states) if _has_same_bits[kind] else plain(states)

    return product


def _is_same(faster: Product, plain: Product, states: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    trials = [torch.randn(states.shape, generator=generator).to(states.dtype) for _ in range(NUM_TRIALS)]
    return all(torch.equal(faster(trial), plain(trial)) for trial in trials)


def _packed(weight: Tensor) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda states: multiply(states, packed, None, "none", [], "")


def _shared(weight: Tensor) -> Product:
    def product(states: Tensor) -> Tensor:
        parts, batch = torch.get_num_threads(), len(states)
        if parts == 1 or len(weight) % parts:
            return F.linear(states, weight)
        rows = weight.view(parts, -1, weight.shape[1]).transpose(1, 2)
        return torch.bmm(states.expand(parts, -1, -1), rows).transpose(0, 1).reshape(batch, -1)

    return product
