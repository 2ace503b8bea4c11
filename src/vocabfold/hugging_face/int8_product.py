"""Products of int8 rows with a few states of 8 bits, exact in int32: the fastest of torch's that this machine has.

* ``quantized.linear_with_input_q_dq_qweight_dq_output_fp32`` (FBGEMM): at few states as fast as memory gives the rows,
  on x86. Its packed rows are made from torch's quantised tensors, which torch means to give up one day.
* ``onednn.qlinear_pointwise``: what torch's compiler calls for int8 on x86; half as slow again. It takes over where the
  first is not there or not exact.

Of torch 2.13's others ``_int_mm`` packs the rows at every call, ``_weight_int8pack_mm`` multiplies in floating point.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from vocabfold.errors import UserError

Product = Callable[[Tensor], Tensor]
NUM_PROBED = 64
LARGEST_ERROR = 2.0**-22  # of a product: two roundings of float32, and twice as much again


def fbgemm_product(rows: Tensor, scale: Tensor) -> Product:
    """``rows`` [V, D] int8, ``scale`` [V] -> a product of ``int8_product``."""
    no_zero_point = torch.zeros(len(rows), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that quantised tensors are to go
        tensor = torch._make_per_channel_quantized_tensor(rows, scale.double(), no_zero_point, 0)
        packed = torch.ops.quantized.linear_prepack(tensor, None)
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    return lambda steps: multiply(steps, 1.0, 128, packed)


def onednn_product(rows: Tensor, scale: Tensor) -> Product:
    """``rows`` [V, D] int8, ``scale`` [V] -> a product of ``int8_product``."""
    no_zero_point = torch.zeros(len(rows), dtype=torch.int64)
    packed = torch.ops.onednn.qlinear_prepack(rows, None)
    multiply = torch.ops.onednn.qlinear_pointwise

    def product(steps: Tensor) -> Tensor:
        shifted = (steps + 128).to(torch.uint8)
        result: Tensor = multiply(
            shifted, 1.0, 128, packed, scale, no_zero_point, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return result

    return product


def int8_product(rows: Tensor, scale: Tensor) -> Product:
    """``rows`` [V, D] int8 within 127, ``scale`` [V] -> a function of steps [B, D], float32 integers from -128 to 127.

    It returns scale * rows.steps [B, V] in float32, the sum exact before two roundings. Raises UserError where no
    product is.
    """
    for build in (fbgemm_product, onednn_product):
        try:
            product = build(rows, scale)
            if is_exact(product, rows, scale):
                return product
        except (AttributeError, RuntimeError, NotImplementedError):
            continue
    raise UserError("torch has no exact int8 product on this machine: the screen needs one")


def is_exact(product: Product, rows: Tensor, scale: Tensor) -> bool:
    """Instructions for int8 on older processors saturate at 16 bits: extremes show it."""
    size = rows.shape[1]
    probed = torch.linspace(0, len(rows) - 1, min(len(rows), NUM_PROBED)).long()
    sample = rows[probed].double()
    steps = torch.full((4, size), 127.0)
    steps[1] = -128
    steps[2, ::2] = -128
    steps[3] = torch.randint(-128, 128, (size,), generator=torch.Generator().manual_seed(0))
    for extremes in (steps, torch.where(sample[:4] < 0, -128.0, 127.0).float(), steps[3:]):
        expected = extremes.double() @ sample.T * scale[probed].double()
        error = (product(extremes)[:, probed].double() - expected).abs()
        if bool((error > LARGEST_ERROR * expected.abs()).any()):
            return False
    return True
