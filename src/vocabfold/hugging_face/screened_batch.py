"""The likeliest tokens of a few hidden states together: ``screened_state``'s proof for k = 1, in a few calls of torch.

Bounds come a panel of rows at a time and are forgotten after it, so that [B, V] of them are never held. The least that
dense can give to the best row scored so far only rises from panel to panel: what lies below it now is no candidate at
the end, and what is kept is compared once more with the last. Within a panel bounds are looked at by blocks: one whose
largest bound is too low holds no candidate. A state that needs more than a look at a few rows (see ``ScreenedState``)
is left to it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vocabfold.hugging_face.quantised_rows import BLOCK, States
from vocabfold.hugging_face.screened_state import (
    BFLOAT16_STEP,
    FLOAT32_STEP,
    Screen,
    dense_interval,
    exact_products,
)

MOST_BLOCKS, MOST_SCORED = 32, 256  # of a state: blocks with candidates, and candidates
LEFT = -1  # in place of a token: not decided here


def likeliest(head: Screen, states: States, panels: Iterable[tuple[int, Tensor]], hidden: Tensor) -> Tensor:
    """``panels`` of bounds (see ``QuantisedRows.panels``) of ``hidden`` [B, D] -> the token [B] that dense picks, or
    LEFT."""
    batch = torch.arange(len(hidden))
    least = torch.full((len(hidden),), -torch.inf)
    is_left = ~states.in_range
    none = torch.empty(0, dtype=torch.long)
    found = [(none, none, torch.empty(0))]
    for start, upper in panels:
        blocks = upper.view(len(hidden), -1, BLOCK)
        largest = blocks.amax(dim=-1)
        first = largest.argmax(dim=-1)
        if not bool((largest[batch, first] >= least).any()):
            continue
        seeds = start + first * BLOCK + blocks[batch, first].argmax(dim=-1)
        seeds = seeds.clamp_(max=head.vocabulary_size - 1)  # a state out of range has no bounds
        least = torch.maximum(least, _least(head, states, seeds, hidden))
        is_high = largest >= least.unsqueeze(-1)
        is_left = is_left | (is_high.sum(dim=-1) > MOST_BLOCKS)
        state, block = (is_high & ~is_left.unsqueeze(-1)).nonzero().unbind(dim=-1)
        bounds = blocks[state, block]
        part, place = (bounds >= least[state].unsqueeze(-1)).nonzero().unbind(dim=-1)
        found.append((state[part], start + block[part] * BLOCK + place, bounds[part, place]))
    state, token, bound = (torch.cat(each) for each in zip(*found, strict=True))
    kept = (bound >= least[state]) & ~is_left[state]
    state, token = state[kept], token[kept]
    number = torch.bincount(state, minlength=len(hidden))
    tokens = torch.full((len(hidden),), LEFT).scatter_(0, state, token)
    tokens[is_left | (number > MOST_SCORED)] = LEFT
    is_open = (number > 1) & (tokens != LEFT)
    if bool(is_open.any()):
        kept = is_open[state]
        tokens = torch.where(is_open, _best(head, state[kept], token[kept], hidden), tokens)
    return tokens


def _least(head: Screen, states: States, seeds: Tensor, hidden: Tensor) -> Tensor:
    """A little less than the least that dense can give to the seeds, in the unit of the bounds: [B]."""
    head.counts.scored += len(seeds)
    low = dense_interval(head, *exact_products(head, seeds, hidden))[0]
    if head.weight.dtype == torch.bfloat16:
        low -= BFLOAT16_STEP * low.abs()
    low /= states.scale
    return (low - FLOAT32_STEP * low.abs()).float()


def _best(head: Screen, state: Tensor, token: Tensor, hidden: Tensor) -> Tensor:
    """Of each state's candidates (``state`` [n], ``token`` [n]) that which dense picks, or LEFT: [B]."""
    head.counts.scored += len(token)
    low, high = dense_interval(head, *exact_products(head, token, hidden[state]))
    least = low.new_full((len(hidden),), -torch.inf).scatter_reduce_(0, state, low, "amax")
    highest_id = head.vocabulary_size
    firsts = torch.where(low == least[state], token, highest_id)
    best = token.new_full((len(hidden),), highest_id).scatter_reduce_(0, state, firsts, "amin")
    is_before = token < best[state]
    undecided = (token != best[state]) & ((high > least[state]) | ((high == least[state]) & is_before))
    return best.index_fill_(0, state[undecided], LEFT)
