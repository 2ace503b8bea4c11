"""Linear scorers on CUDA through Triton: every product reads W where it lies, and its gradient is written once.

No copy of the weight, padded or cast, is ever made. Measured on one card: results/cards/gpu.md.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from vocabfold.heads.kernels import Late, Rows
from vocabfold.heads.partition import Partition
from vocabfold.heads.scorers import SortedTargets


class TritonLinearKernel:
    """The same numbers as LinearKernel: inputs hidden [N, D], W and b. ``module`` is triton_kernels; targets are
    of fixed shapes.

    The logits [N, S] are held in float32, their slopes in the dtype of products. The gradient of W is Late: what waits
    for it are the slopes.
    """

    def __init__(
        self, module: ModuleType, partition: Partition, targets: SortedTargets, tied: bool, dtype: torch.dtype
    ) -> None:
        self.module, self.partition, self.targets, self.tied, self.dtype = module, partition, targets, tied, dtype

    def __call__(self, inputs: tuple[Tensor, ...], weights: Tensor | None, needs: list[bool], with_hits: bool) -> Rows:
        """See Kernel."""
        hidden, weight, bias = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in inputs)
        partition, targets, wanted = self.partition, self.targets, any(needs)
        if len(hidden) == 0 or targets.num_groups == 0:
            log_prob = hidden.new_zeros(len(hidden), dtype=torch.float32)
            hits = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device) if with_hits else None
            return Rows(log_prob, hits, [torch.zeros_like(given) if wanted else None for given in inputs])
        products = self.module.SortedProducts(
            targets.keys,
            targets.rows,
            partition.multi_starts,
            partition.num_slots,
            hidden.shape[1],
            self.dtype,
            partition.multi_tokens if self.tied else None,
        )
        logits = products.logits(hidden, weight)
        slopes = torch.empty_like(logits, dtype=self.dtype) if wanted else None
        groups = (targets.keys, partition.multi_starts, targets.rows)
        log_prob, hits = self.module.softmax_of_rows(logits, bias, targets.slots, weights, slopes, with_hits, groups)
        if slopes is None:
            return Rows(log_prob, hits, [None] * 3)
        grad_weight: Tensor | Late | None = None
        if needs[1] and weights is None:

            def compute(factor: Tensor, hidden: Tensor, weight: Tensor, slopes: Tensor) -> Tensor:
                return products.grad_weight(slopes, hidden, weight, factor)

            grad_weight = Late((hidden.detach(), weight.detach(), slopes), compute)
        elif needs[1]:
            grad_weight = products.grad_weight(slopes, hidden, weight, torch.ones_like(log_prob[:1]))
        grad_hidden = products.grad_hidden(slopes, weight, hidden)
        return Rows(log_prob, hits, [grad_hidden, grad_weight, products.grad_bias(slopes, bias)])
