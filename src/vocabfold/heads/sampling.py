"""Draws of one token from each row of a table of log-probabilities, tempered and cut to a nucleus, and its settings."""

from __future__ import annotations

import torch
from torch import Tensor

from vocabfold.errors import UserError


def check_k(k: int, vocabulary_size: int) -> None:
    """Raise UserError unless 1 <= k <= V."""
    if not 1 <= k <= vocabulary_size:
        raise UserError(f"k is {k}: choose between 1 and the vocabulary size {vocabulary_size}")


REDRAWS = 8  # before a row is sorted: a nucleus of 0.9 is then missed once in 10^8


def check_sampling(temperature: float, top_k: int | None, top_p: float | None, vocabulary_size: int) -> None:
    """Raise UserError for sampling settings that no distribution has."""
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}: choose 0 (the likeliest token) or more")
    if top_k is not None:
        check_k(top_k, vocabulary_size)
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: choose more than 0 and at most 1")


def draw_from_sorted(
    log_prob: Tensor, temperature: float, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Draw a column of ``log_prob`` [N, K], each row sorted best first, tempered and cut to ``top_p``: [N]."""
    # The best first becomes 0: dividing by a tiny temperature then cannot turn a whole row into -inf.
    probability = ((log_prob - log_prob[:, :1]) / temperature).softmax(dim=-1)
    if top_p is not None and top_p < 1:  # at 1 a rounded running sum must not cut the tail
        mass_before = probability.cumsum(dim=-1) - probability
        probability = probability.masked_fill(mass_before >= top_p, 0.0)
    return torch.multinomial(probability, 1, generator=generator).squeeze(-1)


def draw_from_whole(
    log_prob: Tensor, temperature: float, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Draw a token of each row of ``log_prob`` [N, V], tempered and cut to ``top_p``: [N]."""
    best = log_prob.max(dim=-1, keepdim=True).values
    probability = ((log_prob - best) / temperature).softmax(dim=-1)
    tokens = torch.multinomial(probability, 1, generator=generator).squeeze(-1)
    if top_p is not None and top_p < 1:
        return within_nucleus(probability, tokens, top_p, generator)
    return tokens


def within_nucleus(probability: Tensor, tokens: Tensor, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Each row's token [N], drawn from ``probability`` [N, V], or where it is outside the nucleus a draw from that.

    Without a sort where it can be helped: a token stays if those before it (likelier, or as likely with a smaller id)
    hold less than ``top_p``, and is drawn again if they do not. So a token v of a nucleus of mass m comes with
    p(v) + (1 - m) p(v) + (1 - m)^2 p(v) + ... = p(v) / m. What is outside after some draws, as few tokens of a small
    nucleus are inside, is replaced by a draw from the sorted row.
    """
    outside = _is_outside(probability, tokens, top_p).nonzero().squeeze(-1)
    if len(outside) == 0:
        return tokens
    tokens = tokens.clone()
    some = probability[outside]
    mass = some.double().cumsum(dim=-1)
    for _ in range(REDRAWS):
        place = torch.rand(len(some), 1, generator=generator, dtype=mass.dtype, device=mass.device) * mass[:, -1:]
        drawn = torch.searchsorted(mass, place, right=True).clamp_(max=mass.shape[-1] - 1).squeeze(-1)
        tokens[outside] = drawn
        again = _is_outside(some, drawn, top_p).nonzero().squeeze(-1)
        if len(again) == 0:
            return tokens
        outside, some, mass = outside[again], some[again], mass[again]
    ranked = some.sort(dim=-1, descending=True, stable=True)
    choice = draw_from_sorted(ranked.values.log(), 1.0, top_p, generator).unsqueeze(-1)
    return tokens.index_copy(0, outside, ranked.indices.gather(-1, choice).squeeze(-1))


def _is_outside(probability: Tensor, tokens: Tensor, top_p: float) -> Tensor:
    own = tokens.unsqueeze(-1)
    own_probability = probability.gather(-1, own)
    ids = torch.arange(probability.shape[-1], device=probability.device)
    is_before = (probability > own_probability) | ((probability == own_probability) & (ids < own))
    return (probability * is_before).sum(dim=-1) >= top_p
