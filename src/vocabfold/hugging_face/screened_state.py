"""The k best tokens of a hidden state by the bounds of its logits: those that the product with all rows picks.

``dense`` below is the product with all rows, ``hidden @ rows.T`` in the rows' dtype, as ``lm_head`` computes it.

**The k best.** Let U_v >= dense logit of v be the bounds of ``quantised_rows``, and T the least that dense can give to
k rows scored one by one. A row with U_v < T is not among the k best of dense. All others, the candidates, are scored
in float64 by the model's own rows; what dense makes of each lies in [y - e, y + e], e = g sum_i |w_i h_i| (the same
docstring), rounded to bfloat16 where the rows are. If these intervals tell the k best from the others (equal numbers:
the smaller id first), they are what dense picks, **whatever order it sums in**. If they do not (a tie, or closer than
dense's own rounding), dense itself is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vocabfold.hugging_face.quantised_rows import BLOCK, States, accumulation_error

BFLOAT16_STEP = 2.0**-8  # more than the relative distance of a number to its bfloat16, even from the other side
FLOAT32_STEP = 2.0**-22


@dataclass
class Counts:
    """What was read. ``states``: hidden states answered; ``products``: times that the int8 rows were read.

    ``scored``: the model's own rows read one by one. ``dense``: times that all of the model's rows were read, for
    ``dense_ties`` candidates that dense's rounding leaves undecided, ``dense_flat`` too many candidates or proposals,
    ``dense_range`` numbers that are not finite, all zero, or too small or large to bound.
    """

    states: int = 0
    products: int = 0
    scored: int = 0
    dense_ties: int = 0
    dense_flat: int = 0
    dense_range: int = 0

    @property
    def dense(self) -> int:
        """All falls back to the dense product."""
        return self.dense_ties + self.dense_flat + self.dense_range


class Screen(Protocol):
    """What a state asks of the output layer that it belongs to: see ScreenedHead."""

    weight: Tensor
    counts: Counts
    vocabulary_size: int
    hidden_size: int

    def bounds(self, hidden: Tensor) -> tuple[States, Tensor]:
        """``hidden`` [B, D] -> (the states rounded, upper bounds of their logits [B, W])."""


def exact_products(head: Screen, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(rows ``ids`` [n] times ``hidden``, [D] or one each [n, D], in float64, how far dense's sum can be from each)."""
    terms = head.weight[ids].double() * hidden.double()
    return terms.sum(dim=-1), accumulation_error(head.hidden_size) * terms.abs().sum(dim=-1) + 2.0**-90


def dense_interval(head: Screen, scores: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the most that dense can give, as float64 numbers: rounding keeps order."""
    low, high = (scores - error).float(), (scores + error).float()
    if head.weight.dtype == torch.bfloat16:
        low, high = low.bfloat16(), high.bfloat16()
    return low.double(), high.double()


class DenseRows:
    """The dense product of up to STATES_AT_A_TIME states, computed when one of them first asks."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden, self.weight = hidden, weight
        self.logits: Tensor | None = None

    def row(self, index: int, counts: Counts, reason: str) -> Tensor:
        """The logits [V] of one state; ``reason`` names the counter of Counts."""
        if self.logits is None:
            self.logits = F.linear(self.hidden, self.weight)
            setattr(counts, reason, getattr(counts, reason) + 1)
        return self.logits[index]


class ScreenedState:
    """One hidden state's bounds ``padded`` [W] (divided by ``scale``), and the questions that they answer."""

    def __init__(
        self, head: Screen, states: States, index: int, padded: Tensor, hidden: Tensor, dense: DenseRows
    ) -> None:
        self.head, self.index, self.padded, self.hidden, self.dense = head, index, padded, hidden, dense
        self.upper, self.margin = (each[: head.vocabulary_size] for each in (padded, states.margin))
        self.scale = float(states.scale[index])
        self.reach, self.in_range = float(states.reach[index]), bool(states.in_range[index])
        self.is_rounded = head.weight.dtype == torch.bfloat16

    @property
    def most_scored(self) -> int:
        """More rows than this are not scored one by one: all of them in order are faster."""
        return max(1024, self.head.vocabulary_size // 32)

    def highest(self, k: int) -> Tensor:
        """The tokens [k] with the largest bounds: they lie in the k blocks with the largest."""
        blocks = self.padded.view(-1, BLOCK)
        if k >= len(blocks):
            return self.upper.topk(k).indices
        chosen = blocks.amax(dim=-1).topk(k).indices
        best = blocks[chosen].view(-1).topk(k).indices
        return chosen[best // BLOCK] * BLOCK + best % BLOCK

    def topk(self, k: int, as_dense: bool = True) -> tuple[Tensor, Tensor]:
        """(logits [k], tokens [k]) of ``ScreenedHead.topk``; without ``as_dense`` the k best by the exact product,
        rounded once to the rows' dtype, so that dense's own rounding need not be known.
        """
        if not self.in_range:
            return self._dense_topk(k, "dense_range")
        if k > self.most_scored:
            return self._dense_topk(k, "dense_flat")
        seeds = self.highest(k)
        scores, error = self.score(seeds)
        least = float(dense_interval(self.head, scores, error)[0].min())
        least -= BFLOAT16_STEP * abs(least) if self.is_rounded else 0.0
        least /= self.scale
        candidates = (self.upper >= least - FLOAT32_STEP * abs(least)).nonzero().squeeze(-1)
        if len(candidates) > self.most_scored:
            return self._dense_topk(k, "dense_flat")
        if k == 1 and len(candidates) == 1:
            return scores.to(self.head.weight.dtype), seeds
        scores, error = self.score(candidates)
        logits = scores.to(self.head.weight.dtype)
        if as_dense:
            best = self._best_of_dense(k, candidates, *dense_interval(self.head, scores, error))
            if best is None:
                return self._dense_topk(k, "dense_ties")
        else:
            best = torch.arange(len(candidates))
        # Candidates come in the order of their ids, which a stable sort keeps.
        best = best[logits[best].sort(descending=True, stable=True).indices[:k]]
        return logits[best], candidates[best]

    def _best_of_dense(self, k: int, candidates: Tensor, low: Tensor, high: Tensor) -> Tensor | None:
        """Which of the ``candidates`` are dense's k best, in the order of their ids.

        None where the intervals from ``low`` to ``high`` do not tell.
        """
        order = low.sort(descending=True, stable=True).indices
        best, others = order[:k], order[k:]
        least = low[best].min()
        last_at_least = candidates[best[low[best] == least]].max()
        undecided = (high[others] > least) | ((high[others] == least) & (candidates[others] < last_at_least))
        return None if bool(undecided.any()) else best.sort().values

    def score(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(the exact products [n] in float64, how far dense's sum can be from each)."""
        self.head.counts.scored += len(ids)
        return exact_products(self.head, ids, self.hidden)

    def dense_logits(self, reason: str) -> Tensor:
        """The logits [V] of dense; ``reason`` names the counter of Counts."""
        return self.dense.row(self.index, self.head.counts, reason)

    def _dense_topk(self, k: int, reason: str) -> tuple[Tensor, Tensor]:
        logits = self.dense_logits(reason)
        if k == 1:
            token = logits.argmax().unsqueeze(0)
            return logits[token], token
        if not bool(logits.isfinite().all()):
            return logits.topk(k)
        least = logits.topk(k).values[-1]
        above = (logits > least).nonzero().squeeze(-1)
        tokens = torch.cat([above, (logits == least).nonzero().squeeze(-1)[: k - len(above)]]).sort().values
        tokens = tokens[logits[tokens].sort(descending=True, stable=True).indices]
        return logits[tokens], tokens
