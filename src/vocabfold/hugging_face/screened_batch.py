"""The likeliest tokens of a few hidden states together: ``screened_state``'s proof for k = 1, in a few calls of torch.

Bounds are looked at by blocks: a block whose largest bound is too low holds no candidate. A state that needs more than
a look at a few rows (see ``ScreenedState``) is left to it.
"""

from __future__ import annotations

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


def likeliest(head: Screen, states: States, upper: Tensor, hidden: Tensor) -> Tensor:
    """``upper`` [B, W] bounds of ``hidden`` [B, D] -> the token [B] that dense picks, or LEFT."""
    blocks = upper.view(len(hidden), -1, BLOCK)
    largest = blocks.amax(dim=-1)
    first = largest.argmax(dim=-1)
    rows = torch.arange(len(hidden))
    seeds = first * BLOCK + blocks[rows, first].argmax(dim=-1)
    seeds = seeds.clamp_(max=head.vocabulary_size - 1)  # a state out of range has no bounds
    least = _least(head, states, seeds, hidden)
    is_high = largest >= least.unsqueeze(-1)
    is_left = ~states.in_range | (is_high.sum(dim=-1) > MOST_BLOCKS)
    state, block = (is_high & ~is_left.unsqueeze(-1)).nonzero().unbind(dim=-1)
    part, place = (blocks[state, block] >= least[state].unsqueeze(-1)).nonzero().unbind(dim=-1)
    state, token = state[part], block[part] * BLOCK + place  # in the order of states, then of ids
    number = torch.bincount(state, minlength=len(hidden))
    tokens = torch.where(is_left | (number > MOST_SCORED), LEFT, seeds)
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
