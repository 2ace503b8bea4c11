"""The full softmax through fused CUDA kernels of others, logits computed in tiles and never kept.

``cce``: cut-cross-entropy (Apple, arXiv 2411.09009). ``liger``: Liger-Kernel (LinkedIn, arXiv 2410.10989). Both come
with `pip install -e '.[peers]'`. Measured on one card: results/cards/gpu.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vocabfold.errors import UserError
from vocabfold.heads.full import LeanFullHead
from vocabfold.heads.kernels import product_dtype
from vocabfold.tokens import IGNORE_INDEX

KERNELS = {  # name: the package, the module and the function in it
    "cce": ("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy"),
    "liger": ("liger-kernel", "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
}


class FusedHead(LeanFullHead):
    """FullHead with another way to its loss, on CUDA. ``kernel``: "cce" or "liger".

    cut-cross-entropy is called without its gradient filter, which would drop small gradients; it computes in bfloat16
    or float16 only, so under autocast or in a model of that dtype. Raises UserError without CUDA, triton or the
    package, and where cut-cross-entropy is given float32 or is to have a bias.
    """

    def __init__(
        self,
        hidden_size: int,
        vocabulary_size: int,
        tied_weight: nn.Parameter | None = None,
        init_std: float = 0.02,
        softcap: float | None = None,
        kernel: str = "cce",
        with_bias: bool = False,
    ) -> None:
        self.function = load_kernel(kernel)
        if with_bias and kernel == "cce":
            raise UserError(
                "head.kernel=cce takes no biases in the versions that pip installs: use head.kernel=liger or "
                "head.count_biases=false"
            )
        super().__init__(hidden_size, vocabulary_size, tied_weight, init_std, softcap, with_bias)
        self.kernel = kernel

    def _cross_entropy(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        counted = targets != IGNORE_INDEX
        outside = counted & ((targets < 0) | (targets >= self.vocabulary_size))
        some, some_outside = torch.stack([counted.any(), outside.any()]).tolist()  # the device is waited for once
        if not some:
            # A kernel cannot be launched for no rows. The logits of none have a sum of 0 and zero gradients.
            nothing = self.logits(hidden[:0]).sum()
            return nothing if reduction == "sum" else nothing + torch.zeros_like(targets, dtype=nothing.dtype)
        if some_outside:  # no kernel looks: reading beyond the last row would give any number
            raise IndexError(f"a target is outside the vocabulary of {self.vocabulary_size} tokens")
        common = {"ignore_index": IGNORE_INDEX, "reduction": reduction, "softcap": self.softcap}
        if self.bias is not None:
            common["bias"] = self.bias
        if self.kernel == "liger":
            return self.function(hidden, self.weight, targets, accum_dtype=torch.float32, **common)
        dtype = product_dtype(hidden)
        if dtype not in (torch.bfloat16, torch.float16):
            raise UserError(
                "head.kernel=cce computes in bfloat16 or float16: use precision=bf16, or head.kernel=liger for float32"
            )
        return self.function(hidden.to(dtype), self.weight, targets, filter_eps=None, **common)


def load_kernel(name: str) -> Callable[..., Tensor]:
    """The function of a package. Raises UserError for a name not in KERNELS, and where it cannot run."""
    if name not in KERNELS:
        raise UserError(f"head.kernel is {name!r}: choose one of {', '.join(KERNELS)}")
    package, module, function = KERNELS[name]
    instead = "head=chunked has the same loss without [N, V] logits"
    if not torch.cuda.is_available():
        raise UserError(f"head=fused needs CUDA, which this machine or this build of torch has not: {instead}")
    try:
        importlib.import_module("triton")
        loaded: Callable[..., Tensor] = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise UserError(
            f"head.kernel={name} cannot be loaded ({error}): install {package} with pip install -e '.[peers]', or "
            f"use another head: {instead}"
        ) from error
    return loaded
