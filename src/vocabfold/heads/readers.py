"""What a folded head's group scorer reads in place of h itself: a small network's view of it.

A folded head asks h two questions, which group and which token of it. Scored linearly, both read the same D numbers;
with a network of its own before one of them, the other one's needs no longer decide alone what h says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.errors import UserError
from vocabfold.heads.views import View


def default_width(hidden_size: int) -> int:
    """The width of a network between h and a scorer: a few times D where that is small, and never more than 1,024."""
    return min(4 * hidden_size, 1024)


def checked_width(hidden_size: int, width: int | None, key: str, instead: str) -> int:
    """``width``, None for the default. Raises UserError, naming its ``key`` and what to do ``instead``, below 1."""
    width = default_width(hidden_size) if width is None else width
    if width < 1:
        raise UserError(f"{key} is {width}: choose at least 1, or {instead}")
    return width


def normed(hidden: Tensor) -> Tensor:
    """``hidden`` [..., D] with mean 0 and variance 1 in each row, without parameters."""
    return F.layer_norm(hidden, hidden.shape[-1:])


class GroupReader(nn.Module, ABC):
    """Hidden states [N, D] -> features [N, ``num_features``] that the groups' logits are linear in.

    W_1 [width, D] starts as torch's own layers do, the bias as 0. Raises UserError for a width below 1.
    """

    def __init__(self, hidden_size: int, width: int | None = None) -> None:
        super().__init__()
        width = checked_width(hidden_size, width, "head.group_width", "head.group_scorer=linear")
        self.into = nn.Linear(hidden_size, width)
        nn.init.zeros_(self.into.bias)
        self.num_features = hidden_size

    @property
    def network(self) -> tuple[Tensor, ...]:
        """The parameters that ``read`` takes."""
        return self.into.weight, self.into.bias

    @staticmethod
    @abstractmethod
    def read(hidden: Tensor, *network: Tensor) -> Tensor:
        """``hidden`` [N, D] -> features, by the parameters of a network like this one's."""

    def forward(self, hidden: Tensor) -> Tensor:
        """See GroupReader."""
        return self.read(hidden, *self.network)

    def view(self) -> View:
        """The same for a kernel."""
        return View(lambda some, _, *network: self.read(some, *network), self.network)


class ResidualReader(GroupReader):
    """h + W_2 gelu(W_1 norm(h) + b), with W_2 [D, width] 0 at first: D features, h itself to begin with."""

    def __init__(self, hidden_size: int, width: int | None = None) -> None:
        super().__init__(hidden_size, width)
        self.out = nn.Parameter(torch.zeros(hidden_size, self.into.out_features))

    @property
    def network(self) -> tuple[Tensor, ...]:
        """See GroupReader."""
        return *super().network, self.out

    @staticmethod
    def read(hidden: Tensor, *network: Tensor) -> Tensor:
        """See GroupReader."""
        weight, bias, out = network
        return hidden + F.linear(_inner(hidden, weight, bias), out)


class WideReader(GroupReader):
    """h and gelu(W_1 norm(h) + b) beside it: D + width features, so that the groups' logits have that rank."""

    def __init__(self, hidden_size: int, width: int | None = None) -> None:
        super().__init__(hidden_size, width)
        self.num_features = hidden_size + self.into.out_features

    @staticmethod
    def read(hidden: Tensor, *network: Tensor) -> Tensor:
        """See GroupReader."""
        return torch.cat([hidden, _inner(hidden, *network)], dim=-1)


def _inner(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(W_1 norm(h) + b) [N, width]."""
    return F.gelu(F.linear(normed(hidden), weight, bias))
