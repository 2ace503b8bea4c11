"""The next token as a group and a slot within it, which a coder writes one after the other: few weights for each."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from vocabfold.heads.base import Head
from vocabfold.heads.folded import FoldedHead
from vocabfold.heads.full import FullHead


@dataclass
class TwoSymbols:
    """``groups`` [N, G]: weights of the groups, ``slots``: groups [N] -> weights [N, S] of the slots of one group each.

    Weights are proportional to probabilities; a slot without a token has weight 0.
    """

    groups: Tensor
    slots: Callable[[Tensor], Tensor]


class Symbols(ABC):
    """How the tokens of one head fall into groups and slots."""

    @abstractmethod
    def weights(self, hidden: Tensor) -> TwoSymbols:
        """``hidden`` [N, D] -> the weights of both symbols."""

    @abstractmethod
    def of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(group, slot) of each token, as ``weights`` counts them."""

    @abstractmethod
    def tokens(self, groups: Tensor, slots: Tensor) -> Tensor:
        """The inverse of ``of``; V where the slot has no token."""


class SquareSymbols(Symbols):
    """Of any head: groups of ceil(sqrt V) neighbouring tokens, from all V probabilities."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.vocabulary_size = head.vocabulary_size
        self.group_size = math.ceil(math.sqrt(head.vocabulary_size))

    def weights(self, hidden: Tensor) -> TwoSymbols:
        """See Symbols.weights."""
        probability, size = self.probability(hidden), self.group_size
        whole = self.vocabulary_size // size * size
        groups = probability[:, :whole].unflatten(-1, (-1, size)).sum(dim=-1)
        if whole < self.vocabulary_size:
            groups = torch.cat([groups, probability[:, whole:].sum(dim=-1, keepdim=True)], dim=-1)

        def slots(group: Tensor) -> Tensor:
            tokens = group.unsqueeze(-1) * size + torch.arange(size, device=group.device)
            exists = tokens < self.vocabulary_size
            return probability.gather(-1, tokens.clamp(max=self.vocabulary_size - 1)) * exists

        return TwoSymbols(groups, slots)

    def probability(self, hidden: Tensor) -> Tensor:
        """``hidden`` [N, D] -> P [N, V]."""
        if isinstance(self.head, FullHead):
            return self.head.logits(hidden).softmax(dim=-1)  # a pass over [N, V] less than exp(log_prob)
        return self.head.log_prob(hidden).exp()

    def of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See Symbols.of."""
        return tokens // self.group_size, tokens % self.group_size

    def tokens(self, groups: Tensor, slots: Tensor) -> Tensor:
        """See Symbols.tokens."""
        return (groups * self.group_size + slots).clamp(max=self.vocabulary_size)


class FoldedSymbols(Symbols):
    """Of a folded head: its own groups and slots. O(D (G + S)) for each token, O(D G) for one of a shortlist, whose
    slot is certain."""

    def __init__(self, head: FoldedHead) -> None:
        self.head, self.partition = head, head.partition

    def weights(self, hidden: Tensor) -> TwoSymbols:
        """See Symbols.weights."""

        def slots(groups: Tensor) -> Tensor:
            weights = hidden.new_zeros(len(groups), self.partition.num_slots)
            weights[:, 0] = 1.0
            rows = (self.partition.sizes[groups] > 1).nonzero().squeeze(-1)
            if len(rows) > 0:
                log_prob = self.head.scorer.group_log_prob(hidden[rows], groups[rows].unsqueeze(-1)).squeeze(1)
                weights[rows] = log_prob.exp().to(weights.dtype)
            return weights

        return TwoSymbols(self.head.group_log_prob(hidden).exp(), slots)

    def of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See Symbols.of."""
        return self.partition.group_of[tokens], self.partition.slot_of[tokens]

    def tokens(self, groups: Tensor, slots: Tensor) -> Tensor:
        """See Symbols.tokens."""
        exists = slots < self.partition.sizes[groups]
        tokens = self.partition.token_at(groups, slots.where(exists, 0))
        return tokens.where(exists, self.head.vocabulary_size)


@singledispatch
def symbols_of(head: Head) -> Symbols:
    """The symbols that are cheapest to weigh for ``head``."""
    return SquareSymbols(head)


@symbols_of.register
def _(head: FoldedHead) -> Symbols:
    return FoldedSymbols(head)
