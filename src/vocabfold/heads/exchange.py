"""Groups learned from a stream: tokens change places while that lets neighbouring groups tell more about each other.

With n(a, b) how often a token of group b follows one of group a, n(a, .) and n(., b) their sums and f(x) = x log x,

    criterion = sum f(n(a, b)) - sum f(n(a, .)) - sum f(n(., b))

is, but for a factor and a constant, the mutual information of groups that stand beside each other (Brown et al. 1992,
"Class-based n-gram models of natural language"). A token's group is chosen with all other tokens where they are
(Martin, Liermann & Ney 1998, "Algorithms for bigram and trigram word clustering"). Here each group has a given size: a
token changes places with one of the group that it goes to, and only where both moves together raise the criterion.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vocabfold.errors import UserError
from vocabfold.tokens import BLOCK_TOKENS, TokenStream

Integers = NDArray[np.int64]
Numbers = NDArray[np.float64]

SWEEPS = 3
TARGETS_A_TOKEN = 2  # groups that a token tries to enter in a sweep
MOST_BYTES = 8 << 30
LEAST_GAIN = 1e-6  # of the criterion: less may be rounding


@dataclass(frozen=True)
class Bigrams:
    """How often tokens stand beside each other. The neighbours of token v are ``others[starts[v] : starts[v + 1]]``,
    as u where token u follows v and as V + u where u goes before v, each seen ``numbers`` times; ``repeats`` [V]: how
    often v follows itself, which is not among them."""

    starts: Integers
    others: Integers
    numbers: Numbers
    repeats: Numbers


def count_bigrams(tokens: TokenStream, vocabulary_size: int) -> Bigrams:
    """Counted on the whole stream. Takes about 100 bytes for each pair of tokens that occurs."""
    pairs, numbers = np.empty(0, dtype=np.int64), np.empty(0)
    for start in range(0, len(tokens) - 1, BLOCK_TOKENS):
        block = tokens[start : start + BLOCK_TOKENS + 1].astype(np.int64)
        found, times = np.unique(block[:-1] * vocabulary_size + block[1:], return_counts=True)
        pairs, place = np.unique(np.concatenate([pairs, found]), return_inverse=True)
        numbers = sums(place, np.concatenate([numbers, times]), len(pairs))
    first, second = np.divmod(pairs, vocabulary_size)
    is_repeat = first == second
    repeats = sums(first[is_repeat], numbers[is_repeat], vocabulary_size)
    first, second, numbers = first[~is_repeat], second[~is_repeat], numbers[~is_repeat]
    token = np.concatenate([first, second])
    by_token = token.argsort(kind="stable")
    starts = np.searchsorted(token[by_token], np.arange(vocabulary_size + 1))
    others = np.concatenate([second, first + vocabulary_size])[by_token]
    return Bigrams(starts, others, np.concatenate([numbers, numbers])[by_token], repeats)


def mutual_information(tokens: TokenStream, group_of: Tensor) -> float:
    """What the group of a token in a stream tells of the next one's, in nats: ``group_of`` [V]."""
    groups, num_groups = group_of.numpy(), int(group_of.max()) + 1
    numbers = np.zeros((num_groups, num_groups))
    for start in range(0, len(tokens) - 1, BLOCK_TOKENS):
        block = groups[tokens[start : start + BLOCK_TOKENS + 1].astype(np.int64)]
        np.add.at(numbers, (block[:-1], block[1:]), 1.0)
    total = numbers.sum()
    logs = x_log_x(numbers).sum() - x_log_x(numbers.sum(0)).sum() - x_log_x(numbers.sum(1)).sum() + x_log_x(total)
    return float(logs / max(total, 1.0))


def exchanged_order(
    tokens: TokenStream, order: Tensor, boundaries: Tensor, shortlist: int = 0, bands: Tensor | None = None
) -> Tensor:
    """``order`` [V] with tokens exchanged between the groups of ``boundaries`` [G + 1], each of which keeps its size,
    after a few sweeps over the tokens of a stream: [V]. The first ``shortlist`` tokens stay, and the others in groups
    of the same number in ``bands`` [G - K] (None: in any). Deterministic. Raises UserError for so many groups that
    their tables would not fit into memory."""
    bigrams = count_bigrams(tokens, len(order))
    num_groups, num_tokens = len(boundaries) - 1 - shortlist, int((np.diff(bigrams.starts) > 0).sum())
    if (size := 32 * num_groups * (num_groups + shortlist) + 4 * num_groups * num_tokens) > MOST_BYTES:
        raise UserError(
            f"head.partition.order=exchanged takes {size / 2**30:.0f} GiB for {num_groups:,} groups: choose a "
            "larger head.partition.group_size, or head.partition.order=clustered"
        )
    exchange = Exchange(bigrams, order.numpy(), boundaries.numpy(), shortlist, None if bands is None else bands.numpy())
    for _ in range(SWEEPS):
        exchange.sweep()
    return torch.from_numpy(exchange.order)


def sums(places: Integers, numbers: Numbers, length: int) -> Numbers:
    """The sum of the ``numbers`` at each of so many places. numpy's own has whole numbers where there is none."""
    return np.bincount(places, numbers, length).astype(np.float64, copy=False)


def x_log_x(counts: Numbers) -> Numbers:
    """Of whole numbers, 0 for 0."""
    return counts * np.log(np.maximum(counts, 1.0))


class Exchange:
    """An ``order`` [V] of the tokens, the group boundaries [G + 1] over its positions, and what the bigrams of a stream
    say of them. ``sweep`` betters the order; the sizes of the groups stay.

    The first ``shortlist`` K tokens, groups of one, stay too: they count as neighbours only, and what they say of each
    other is left out of the criterion. A token goes to groups with its own one's number in ``bands`` [G - K] alone
    (None: to any). Takes 4 G bytes for each token that occurs and 32 G (G + K) for the groups.
    """

    def __init__(
        self,
        bigrams: Bigrams,
        order: Integers,
        boundaries: Integers,
        shortlist: int = 0,
        bands: Integers | None = None,
    ) -> None:
        self.bigrams, self.order, self.boundaries = bigrams, order.copy(), boundaries[shortlist:]
        self.num_groups = num_groups = len(self.boundaries) - 1
        self.num_contexts = num_contexts = num_groups + shortlist
        self.bands = np.zeros(num_groups, dtype=np.int64) if bands is None else bands
        self.position_of, self.group_of = np.empty_like(order), np.empty_like(order)
        self.position_of[order] = np.arange(len(order))
        moving = np.repeat(np.arange(num_groups), np.diff(self.boundaries))
        self.group_of[order] = np.concatenate([num_groups + np.arange(shortlist), moving])
        # The row of the table below for a neighbour: token u that follows, and V + u that goes before.
        self.row_of = np.concatenate([self.group_of, num_contexts + self.group_of])
        owner = np.repeat(np.arange(len(order)), np.diff(bigrams.starts))
        moves = self.group_of < num_groups
        counted = moves[owner]
        cells = self.row_of[bigrams.others[counted]] * num_groups + self.group_of[owner[counted]]
        # [2 (G + K), G]: n(column, row) and below it n(row, column): a token's neighbours on either side are rows.
        numbers = sums(cells, bigrams.numbers[counted], 2 * num_contexts * num_groups)
        self.beside = numbers.reshape(-1, num_groups)
        groups = np.arange(num_groups)
        repeats = sums(self.group_of[moves], bigrams.repeats[moves], num_groups)
        self.beside[groups, groups] += repeats
        self.beside[num_contexts + groups, groups] += repeats
        self.logs = x_log_x(self.beside)
        self.totals = np.stack([side.sum(0) for side in np.split(self.beside, 2)])  # [2, G]
        is_after = bigrams.others < len(order)
        sides = (sums(owner[side], bigrams.numbers[side], len(order)) for side in (is_after, ~is_after))
        self.times = np.stack([side + bigrams.repeats for side in sides], axis=1)[:, :, None]  # [V, 2, 1]
        occurs = self.times.sum((1, 2)) * moves
        self.tokens = np.argsort(-occurs, kind="stable")[: int((occurs > 0).sum())]  # the most frequent first
        # What each group offered a token when it was last looked at; row 0 is that of tokens that never occur.
        self.offers = np.zeros((1 + len(self.tokens), num_groups), dtype=np.float32)
        self.offers_of = np.zeros_like(order)
        self.offers_of[self.tokens] = 1 + np.arange(len(self.tokens))

    @property
    def criterion(self) -> float:
        """See the module's first lines; in nats over the whole stream."""
        after, before = np.split(self.logs, 2)
        return float(after.sum() + before[self.num_groups :].sum() - x_log_x(self.totals).sum())

    def sweep(self) -> int:
        """Look at each token that occurs once; return how many changed places with another."""
        return sum(self._place(token) for token in self.tokens.tolist())

    def _place(self, token: int) -> bool:
        """Where the token has a better group that gives up one of its own for it, both change places."""
        home = int(self.group_of[token])
        beside = self._take(token)
        gains = self._gains(token, beside)
        self.offers[self.offers_of[token]] = gains
        better = ((gains > gains[home] + LEAST_GAIN) & (self.bands == self.bands[home])).nonzero()[0]
        for target in better[np.argsort(-gains[better], kind="stable")[:TARGETS_A_TOKEN]].tolist():
            members = self.order[self.boundaries[target] : self.boundaries[target + 1]]
            offers = self.offers_of[members]
            other = int(members[np.argmax(self.offers[offers, home] - self.offers[offers, target])])
            self._put(token, beside, target)
            others_beside = self._take(other)
            others_gains = self._gains(other, others_beside)
            self.offers[self.offers_of[other]] = others_gains
            if gains[target] + others_gains[home] > gains[home] + others_gains[target] + LEAST_GAIN:
                self._put(other, others_beside, home)
                here, there = self.position_of[token], self.position_of[other]
                self.order[here], self.order[there] = other, token
                self.position_of[token], self.position_of[other] = there, here
                return True
            self._put(other, others_beside, target)
            self._take(token)
        self._put(token, beside, home)
        return False

    def _take(self, token: int) -> Numbers:
        """Take a token out of its group; return how often each group, and below each token of the shortlist, follows
        it, then how often each goes before it: [2 (G + K)]."""
        part = slice(self.bigrams.starts[token], self.bigrams.starts[token + 1])
        rows = self.row_of[self.bigrams.others[part]]
        beside = sums(rows, self.bigrams.numbers[part], 2 * self.num_contexts)
        self._add(token, beside, int(self.group_of[token]), -1.0)
        return beside

    def _put(self, token: int, beside: Numbers, group: int) -> None:
        self.group_of[token] = group
        self.row_of[token], self.row_of[len(self.order) + token] = group, self.num_contexts + group
        self._add(token, beside, group, 1.0)

    def _add(self, token: int, beside: Numbers, group: int, sign: float) -> None:
        """Count a token's neighbours as those of a group (sign 1) or no longer (-1)."""
        table, logs = self.beside, self.logs
        rows = beside.nonzero()[0]
        change = sign * beside[rows]
        table[rows, group] += change
        logs[rows, group] = x_log_x(table[rows, group])
        # A pair of groups is in the table twice, as a number in the column of either.
        context = rows % self.num_contexts
        twice = context < self.num_groups
        mirrored = np.where(rows < self.num_contexts, self.num_contexts + group, group)[twice], context[twice]
        table[mirrored] += change[twice]
        logs[mirrored] = x_log_x(table[mirrored])
        if repeats := sign * self.bigrams.repeats[token]:
            own = [group, self.num_contexts + group]
            table[own, group] += repeats
            logs[own, group] = x_log_x(table[own, group])
        self.totals[:, group] += sign * self.times[token, :, 0]

    def _gains(self, token: int, beside: Numbers) -> Numbers:
        """By how much the criterion grows if the token, which is in no group, is put into each group: [G]."""
        rows = beside.nonzero()[0]
        gains: Numbers = (x_log_x(self.beside[rows] + beside[rows, None]) - self.logs[rows]).sum(0)
        # Both sides were added to n(g, g), each to the number without the other.
        own, own_logs = self.beside.diagonal(), self.logs.diagonal()
        after, before = beside[: self.num_groups], beside[self.num_contexts : self.num_contexts + self.num_groups]
        together = x_log_x(own + (after + before + self.bigrams.repeats[token]))
        gains += together - x_log_x(own + after) - x_log_x(own + before) + own_logs
        return gains - (x_log_x(self.totals + self.times[token]) - x_log_x(self.totals)).sum(0)
