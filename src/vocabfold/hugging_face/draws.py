"""Draws from a softmax over V tokens, exactly, by bounds of its logits.

Let y_v be the model's logit of v: the exact product, rounded to the rows' dtype, and T the temperature. Token v is
proposed with a probability proportional to exp(U_v / T) and kept with exp((y_v - U_v) / T) <= 1, so it comes out with a
probability proportional to exp(y_v / T): the tempered softmax over all V, exactly. (Weights are float32, their running
sum float64.) U_v is replaced by y_v for the rows with the largest bounds, so that most proposals are kept. After
MOST_PROPOSALS in vain a draw from dense takes their place, which changes no probability: it does not depend on them.

**top_p.** A token drawn so is kept if it is in the nucleus, otherwise drawn again: the renormalised nucleus. It is in
the nucleus if the tokens before it (likelier, or as likely with a smaller id) hold less than top_p. Of the tokens that
were scored and lie above every other's bound the mass before them is known exactly, the whole mass Z between two
bounds. Where they do not decide, four times as many rows are scored, and in the end all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vocabfold.errors import UserError
from vocabfold.heads.base import log_softmax
from vocabfold.heads.sampling import draw_from_whole
from vocabfold.hugging_face.screened_state import BFLOAT16_STEP, ScreenedState

NOT_FINITE = "the logits of a hidden state are not finite: nothing can be drawn from them"
MOST_PROPOSALS = 64
SCORED_FIRST = 256  # rows scored before the first proposal
WEIGHT_ERROR = 1e-5  # more than the relative error of float32 weights and their sums


def draw(state: ScreenedState, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """A token of the tempered softmax, or of its nucleus. Raises UserError for logits that are not finite."""
    if not state.in_range:
        return _dense_draw(state, "dense_range", temperature, top_p, generator)
    proposals = Proposals(state, temperature)
    for _ in range(MOST_PROPOSALS):
        token = proposals.draw(generator)
        if token is not None and (top_p >= 1 or proposals.is_inside(token, top_p)):
            return token
    return _dense_draw(state, "dense_flat", temperature, top_p, generator)


def _dense_draw(
    state: ScreenedState, reason: str, temperature: float, top_p: float, generator: torch.Generator | None
) -> int:
    logits = state.dense_logits(reason)
    if not bool(logits.isfinite().all()):
        raise UserError(NOT_FINITE)
    return int(draw_from_whole(log_softmax(logits.unsqueeze(0)), temperature, top_p, generator))


class Proposals:
    """Tokens in proportion to exp(bound / temperature), where the largest bounds are made exact."""

    def __init__(self, state: ScreenedState, temperature: float) -> None:
        self.state, self.temperature = state, temperature
        self.num_tokens = len(state.upper)
        # In logits: one rounding here, of the eight that the margin allows the dense sum.
        self.bounds = state.upper * state.scale
        if state.is_rounded:
            self.bounds += BFLOAT16_STEP * self.bounds.abs()
        self.is_scored = torch.zeros(self.num_tokens, dtype=torch.bool)
        self._score_largest(SCORED_FIRST)

    def _score_largest(self, count: int) -> None:
        """Make the ``count`` largest bounds exact, and compute all weights."""
        if count >= self.num_tokens:
            ids = (~self.is_scored).nonzero().squeeze(-1)
        else:
            ids = self.bounds.topk(count).indices
            ids = ids[~self.is_scored[ids]]
        self.bounds[ids] = self.state.score(ids)[0].to(self.state.head.weight.dtype).float()
        self.is_scored[ids] = True
        self.largest = float(self.bounds.max())
        self.weights = self.bounds.sub(self.largest).div_(self.temperature).exp_()
        self.cumulative = self.weights.cumsum(0, dtype=torch.float64)
        self.nucleus: Nucleus | None = None

    def draw(self, generator: torch.Generator | None) -> int | None:
        """A token of the softmax; None if the proposed one was not kept."""
        chance, coin = torch.rand(2, dtype=torch.float64, generator=generator).tolist()
        token = int(torch.searchsorted(self.cumulative, chance * float(self.cumulative[-1]), right=True))
        token = min(token, self.num_tokens - 1)
        if not self.is_scored[token]:
            logit = self.state.score(torch.tensor([token]))[0].to(self.state.head.weight.dtype)
            if coin >= math.exp(min((float(logit) - float(self.bounds[token])) / self.temperature, 0.0)):
                return None
        return token

    def is_inside(self, token: int, top_p: float) -> bool:
        """Whether ``token`` is in the nucleus of ``top_p``."""
        count = SCORED_FIRST
        while True:
            if self.nucleus is None:
                self.nucleus = Nucleus(self)
            decided = self.nucleus.has(token, top_p)
            if decided is not None:
                return decided
            count = max(4 * count, 4 * int(self.is_scored.sum()))
            if count > self.state.most_scored:
                return self._is_inside_dense(token, top_p)
            self._score_largest(count)

    def _is_inside_dense(self, token: int, top_p: float) -> bool:
        logits = self.state.dense_logits("dense_flat").double()
        probability = (logits / self.temperature).softmax(dim=-1)
        ids = torch.arange(self.num_tokens)
        is_before = (logits > logits[token]) | ((logits == logits[token]) & (ids < token))
        return float(probability[is_before].sum()) < top_p

    def least_weights(self) -> Tensor:
        """exp(lower bound / temperature) [V], in the unit of ``weights``; of use where a token is not scored."""
        state = self.state
        lower = (state.upper - 2 * state.reach * state.margin).mul_(state.scale)
        if state.is_rounded:
            lower -= BFLOAT16_STEP * lower.abs()
        return lower.sub_(self.largest).div_(self.temperature).exp_()


class Nucleus:
    """What is known of the order and the masses of likely tokens, in the unit of the proposals' weights.

    ``ids`` are the scored tokens above the bound of every other, likeliest first; ``before`` the mass before each;
    ``mass`` their sum, ``least`` and ``most`` the bounds of the mass of all V.
    """

    def __init__(self, proposals: Proposals) -> None:
        scored = proposals.is_scored
        scores = proposals.bounds[scored]
        exact = ((scores.double() - proposals.largest) / proposals.temperature).exp()
        others = proposals.bounds.masked_fill(scored, -math.inf).max()
        rest_most = float(proposals.weights.masked_fill(scored, 0.0).sum(dtype=torch.float64))
        rest_least = float(proposals.least_weights().masked_fill_(scored, 0.0).sum(dtype=torch.float64))
        self.least = float(exact.sum()) + rest_least * (1 - WEIGHT_ERROR)
        self.most = float(exact.sum()) + rest_most * (1 + WEIGHT_ERROR)
        order = scores.sort(descending=True, stable=True).indices
        order = order[scores[order] > others]
        self.ids = scored.nonzero().squeeze(-1)[order]
        mass = exact[order]
        self.before = mass.cumsum(0) - mass
        self.mass = float(mass.sum())

    def has(self, token: int, top_p: float) -> bool | None:
        """Whether ``token`` is among the likeliest that hold ``top_p``; None where the bounds leave it open."""
        place = (self.ids == token).nonzero()
        before = float(self.before[place]) if len(place) else self.mass
        if before >= top_p * self.most:
            return False
        return True if len(place) and before < top_p * self.least else None
