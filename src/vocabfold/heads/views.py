"""A small network between the hidden states and a kernel, read a few rows at a time.

What autograd keeps of it, several times as wide as h, then lives as long as one chunk of rows is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vocabfold.heads.kernels import sum_dtype


@dataclass
class View:
    """``function(some [R, D], rows, *parameters)`` -> what a kernel reads [R, F] in place of the hidden states of
    those ``rows``, a slice or indices [R]. Made where autocast is as the function wants it: kernels run without."""

    function: Callable[..., Tensor]
    parameters: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        self.device_type = self.parameters[0].device.type
        self.autocast_type = torch.get_autocast_dtype(self.device_type)
        self.autocast_enabled = torch.is_autocast_enabled(self.device_type)

    def autocast(self) -> torch.autocast:
        """As it was where the view was made."""
        return torch.autocast(self.device_type, self.autocast_type, self.autocast_enabled)


class ViewPass:
    """The view of one call of a kernel, whose last inputs are the view's parameters; without a view, h itself.

    A chunk is ``read`` and then, where gradients are ``wanted``, taken ``back``, before the next one. ``inputs``: the
    others; ``gradients``: the parameters' so far.
    """

    def __init__(self, view: View | None, inputs: tuple[Tensor, ...], wanted: bool) -> None:
        own = 0 if view is None else len(view.parameters)
        self.view, self.wanted = view, wanted
        self.inputs, self.parameters = inputs[: len(inputs) - own], inputs[len(inputs) - own :]
        self.gradients = [torch.zeros_like(p, dtype=sum_dtype(p.dtype)) for p in self.parameters] if wanted else []

    def read(self, some: Tensor, rows: slice | Tensor) -> Tensor:
        """``some`` [R, D], the hidden states of ``rows`` -> what stands in their place [R, F]."""
        if self.view is None:
            return some
        self.tracked = [tensor.detach().requires_grad_(self.wanted) for tensor in (some, *self.parameters)]
        with torch.set_grad_enabled(self.wanted), self.view.autocast():
            self.features = self.view.function(self.tracked[0], rows, *self.tracked[1:])
        return self.features.detach()

    def back(self, grad_features: Tensor) -> Tensor:
        """The gradient by what was read last -> that by its hidden states [R, D]."""
        if self.view is None:
            return grad_features
        grad_some, *grads = torch.autograd.grad(self.features, self.tracked, grad_features.to(self.features.dtype))
        del self.features, self.tracked  # before the next chunk is read
        for total, grad in zip(self.gradients, grads, strict=True):
            total += grad
        return grad_some
