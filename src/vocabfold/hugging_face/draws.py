"""Draws from a softmax over V tokens, exactly, by bounds of its logits.

Let y_v be the model's logit of v: the exact product, rounded to the rows' dtype, and T the temperature. Token v is
proposed with a probability proportional to exp(U_v / T) and kept with exp((y_v - U_v) / T) <= 1, so it comes out with a
probability proportional to exp(y_v / T): the tempered softmax over all V, exactly. (Weights and their sums over a block
are float32, the rest float64.) U_v is replaced by y_v for the rows with the largest bounds, so that most proposals are
kept. After MOST_PROPOSALS in vain a draw from dense takes their place, which changes no probability: it does not
depend on them.

**top_p.** A token drawn so is kept if it is in the nucleus, otherwise drawn again: the renormalised nucleus. It is in
the nucleus if the tokens before it (likelier, or as likely with a smaller id) hold less than top_p. Of the tokens that
were scored and lie above every other's bound the mass before them is known exactly, the whole mass Z between two
bounds. Where they do not decide, four times as many rows are scored, and in the end all. A
nucleus that is clearly too large for that is drawn from dense at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vocabfold.errors import UserError
from vocabfold.heads.base import log_softmax
from vocabfold.heads.sampling import draw_from_whole
from vocabfold.hugging_face.quantised_rows import BLOCK
from vocabfold.hugging_face.screened_state import BFLOAT16_STEP, ScreenedState

NOT_FINITE = "the logits of a hidden state are not finite: nothing can be drawn from them"
MOST_PROPOSALS = 64
SCORED_FIRST = 128  # rows scored before the first proposal
SMALLEST_SHARE = 0.25  # of top_p: where the first rows hold less, the nucleus has too many to be scored one by one
WEIGHT_ERROR = 1e-5  # more than the relative error of float32 weights and their sums
TINY = 1e-300


def draw(state: ScreenedState, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """A token of the tempered softmax, or of its nucleus. Raises UserError for logits that are not finite."""
    if not state.in_range:
        return _dense_draw(state, "dense_range", temperature, top_p, generator)
    proposals = Proposals(state, temperature)
    # Decided before a token is proposed, so that it changes no probability.
    if top_p < 1 and proposals.least_share < SMALLEST_SHARE * top_p:
        return _dense_draw(state, "dense_flat", temperature, top_p, generator)
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
    """Tokens in proportion to exp(bound / temperature), where the largest bounds are made exact.

    ``ids`` [n] were scored: ``scores`` [n] their logits. The others have ``bounds`` [W] (minus infinity for those that
    were), their weights and the sums of these over blocks.
    """

    def __init__(self, state: ScreenedState, temperature: float) -> None:
        self.state, self.temperature = state, temperature
        self.num_tokens = state.head.vocabulary_size
        # In logits: one rounding here, of the eight that the margin allows the dense sum.
        self.bounds = state.padded * state.scale
        if state.is_rounded:
            of_tokens = self.bounds[: self.num_tokens]
            of_tokens.add_(of_tokens.abs(), alpha=BFLOAT16_STEP)
        self.ids, self.scores = torch.empty(0, dtype=torch.long), torch.empty(0)
        self._score(state.highest(min(SCORED_FIRST, self.num_tokens)))

    def _score(self, ids: Tensor) -> None:
        """Make the bounds of ``ids`` exact, and compute all weights."""
        scores = self.state.score(ids)[0].to(self.state.head.weight.dtype).float()
        self.ids, self.scores = torch.cat([self.ids, ids]), torch.cat([self.scores, scores])
        self.bounds[ids] = -math.inf
        self.highest = float(self.bounds.max())  # of the others
        self.largest = max(float(self.scores.max()), self.highest)
        self.weights = self.bounds.sub(self.largest).div_(self.temperature).exp_()
        self.sums = self.weights.view(-1, BLOCK).sum(dim=-1)
        self.cumulative = self.sums.cumsum(0, dtype=torch.float64)
        self.exact = ((self.scores.double() - self.largest) / self.temperature).exp().cumsum(0)
        self.nuclei: list[Nucleus] = []

    @property
    def least_share(self) -> float:
        """The share of the whole mass that the scored tokens hold at least."""
        return float(self.exact[-1]) / (float(self.exact[-1]) + float(self.cumulative[-1]))

    def draw(self, generator: torch.Generator | None) -> int | None:
        """A token of the softmax; None if the proposed one was not kept."""
        chance, coin = torch.rand(2, dtype=torch.float64, generator=generator).tolist()
        scored_mass = float(self.exact[-1])
        chance *= scored_mass + float(self.cumulative[-1])
        if chance < scored_mass:
            return int(self.ids[torch.searchsorted(self.exact, chance, right=True)])
        chance -= scored_mass
        block = min(int(torch.searchsorted(self.cumulative, chance, right=True)), len(self.sums) - 1)
        start = float(self.cumulative[block - 1]) if block else 0.0
        inside = self.weights[block * BLOCK : (block + 1) * BLOCK].cumsum(0, dtype=torch.float64)
        chance = (chance - start) / max(float(self.sums[block]), TINY) * float(inside[-1])
        token = block * BLOCK + min(int(torch.searchsorted(inside, chance, right=True)), BLOCK - 1)
        if not float(self.weights[token]) > 0:  # at an edge of its block, by a rounding
            return None
        logit = self.state.score(torch.tensor([token]))[0].to(self.state.head.weight.dtype)
        kept = math.exp(min((float(logit) - float(self.bounds[token])) / self.temperature, 0.0))
        return token if coin < kept else None

    def is_inside(self, token: int, top_p: float) -> bool:
        """Whether ``token`` is in the nucleus of ``top_p``."""
        while True:
            for has_bound_below in (False, True):
                if len(self.nuclei) <= has_bound_below:
                    self.nuclei.append(Nucleus(self, has_bound_below))
                decided = self.nuclei[has_bound_below].has(token, top_p)
                if decided is not None:
                    return decided
            count = 3 * len(self.ids)
            if len(self.ids) + count > self.state.most_scored:
                return self._is_inside_dense(token, top_p)
            rest = self.num_tokens - len(self.ids)
            self._score(self.bounds.topk(min(count, rest)).indices)

    def _is_inside_dense(self, token: int, top_p: float) -> bool:
        logits = self.state.dense_logits("dense_flat").double()
        probability = (logits / self.temperature).softmax(dim=-1)
        ids = torch.arange(self.num_tokens)
        is_before = (logits > logits[token]) | ((logits == logits[token]) & (ids < token))
        return float(probability[is_before].sum()) < top_p

    def least_rest(self) -> float:
        """Less than the mass of the tokens that were not scored, in the unit of ``weights``."""
        state = self.state
        lower = (state.upper - 2 * state.reach * state.margin).mul_(state.scale)
        if state.is_rounded:
            lower.sub_(lower.abs(), alpha=BFLOAT16_STEP)
        lower[self.ids] = -math.inf
        weights = lower.sub_(self.largest).div_(self.temperature).exp_()
        return float(weights.sum(dtype=torch.float64)) * (1 - WEIGHT_ERROR)


class Nucleus:
    """What is known of the order and the masses of likely tokens, in the unit of the proposals' weights.

    ``ids`` are the scored tokens above the bound of every other, likeliest first; ``before`` the mass before each;
    ``mass`` their sum, ``least`` and ``most`` the bounds of the mass of all V. Without ``has_bound_below`` the least
    mass of tokens that were not scored is taken for 0, which is quick and mostly enough.
    """

    def __init__(self, proposals: Proposals, has_bound_below: bool) -> None:
        exact = ((proposals.scores.double() - proposals.largest) / proposals.temperature).exp()
        scored = float(exact.sum())
        self.least = scored + (proposals.least_rest() if has_bound_below else 0.0)
        self.most = scored + float(proposals.cumulative[-1]) * (1 + WEIGHT_ERROR)
        by_id = proposals.ids.sort().indices  # of equal logits the smaller id comes first
        order = by_id[proposals.scores[by_id].sort(descending=True, stable=True).indices]
        order = order[proposals.scores[order] > proposals.highest]
        self.ids = proposals.ids[order]
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
