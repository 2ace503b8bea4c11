"""The full softmax through torch.nn.functional.linear_cross_entropy: its loss a chunk of rows at a time, never [N, V].

torch 2.13, https://docs.pytorch.org/docs/2.13/generated/torch.nn.functional.linear_cross_entropy.html
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.errors import UserError
from vocabfold.heads.full import LeanFullHead
from vocabfold.heads.kernels import sum_dtype
from vocabfold.tokens import IGNORE_INDEX


class ChunkedHead(LeanFullHead):
    """FullHead with another way to its loss: gradients are computed in the forward pass, ``chunk_rows`` rows at a time.

    Without options torch's function keeps [N, V] logits like any other, and its automatic chunk is a few rows. It
    knows no autocast, and bfloat16 inputs would get a loss rounded to bfloat16: here it always computes in float32
    (float64 for a float64 model). A loss can be taken backward once, and memory simulated without data misses the
    chunk's logits. Raises UserError unless chunk_rows is at least 1, and where torch is older than 2.13.
    """

    def __init__(
        self,
        hidden_size: int,
        vocabulary_size: int,
        tied_weight: nn.Parameter | None = None,
        init_std: float = 0.02,
        chunk_rows: int = 512,
        with_bias: bool = False,
    ) -> None:
        if chunk_rows < 1:
            raise UserError(f"head.chunk_rows is {chunk_rows}: choose at least 1")
        if not hasattr(F, "linear_cross_entropy"):
            raise UserError(
                f"head=chunked needs torch 2.13 or newer, and this is {torch.__version__}: use head=full or head=fused"
            )
        super().__init__(hidden_size, vocabulary_size, tied_weight, init_std, with_bias=with_bias)
        self.options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_rows, chunking_method=None)

    def _cross_entropy(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        dtype = sum_dtype(hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear_cross_entropy(
                hidden.to(dtype),
                self.weight.to(dtype),
                targets,
                linear_bias=None if self.bias is None else self.bias.to(dtype),
                reduction=reduction,
                ignore_index=IGNORE_INDEX,
                options=self.options,
            )
