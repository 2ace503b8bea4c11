"""The least that a step can cost on this machine: its matrix products, and the bytes that it has to move.

Two bounds: the products at the machine's best matrix rate, or each product of the step at the rate that its own shape
reaches alone. Elementwise work, the exponentials of a softmax above all, is in neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vocabfold.machine import least_seconds

aten = torch.ops.aten
# Which two arguments of an operator are multiplied.
_FACTORS = {aten.mm.default: (0, 1), aten.mm.out: (0, 1), aten.addmm_.default: (1, 2), aten.addmm.default: (1, 2)}

# Shape and strides of both factors of a product.
_Product = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Products:
    """The products of matrices in a step: their floating point operations, and the seconds that they take alone."""

    flops: int
    seconds: float


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[_Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTORS:
            left, right = (args[place] for place in _FACTORS[func])
            self.products[(tuple(left.shape), left.stride(), tuple(right.shape), right.stride())] += 1
        return func(*args, **(kwargs or {}))


def products_of(step: Callable[[], Any], device: torch.device, dtype: torch.dtype = torch.float32) -> Products:
    """Run ``step`` once and then each distinct product [M, K] x [K, N] in it alone, warm: its least time counts."""
    with _Recorder() as recorder:
        step()
    flops, seconds = 0, 0.0
    with torch.no_grad():
        for (left_shape, left_stride, right_shape, right_stride), number in recorder.products.items():
            left = torch.empty_strided(left_shape, left_stride, dtype=dtype, device=device).fill_(1.0)
            right = torch.empty_strided(right_shape, right_stride, dtype=dtype, device=device).fill_(1.0)
            result = torch.empty(left_shape[0], right_shape[1], dtype=dtype, device=device)
            flops += number * 2 * left_shape[0] * left_shape[1] * right_shape[1]
            seconds += number * least_seconds(lambda: torch.mm(left, right, out=result), device)  # noqa: B023
    return Products(flops, seconds)


def least_bytes(inputs: Iterable[Tensor]) -> int:
    """Bytes that a forward and backward pass has to read and write once, from ``inputs`` that hold its dense gradients.

    Each gradient is written; of an input the rows are read that have a gradient other than zero.
    """
    total = 0
    for tensor in inputs:
        if tensor.grad is None:
            continue
        rows = tensor.grad.reshape(len(tensor), -1)
        used = int((rows != 0).any(dim=1).sum())
        total += tensor.grad.nbytes + used * rows.shape[1] * tensor.element_size()
    return total
