"""Canonical Huffman codes of limited length; decoding looks one code up for each lane at a time.

Lengths by package-merge (Larmore and Hirschberg 1990): no code of that length limit is shorter. Canonical: codes rise
with (length, token), so that the lengths alone are the model.
"""

from __future__ import annotations

from typing import Self

import numpy as np

from vocabfold.coding.base import Coded, SegmentCoder
from vocabfold.coding.damage import DamagedStream
from vocabfold.coding.frequencies import index_of, pack, unpack
from vocabfold.tokens import token_counts

LONGEST = 20  # bits of a code, more where the alphabet is large: the look-up table has 2^longest entries
MOST_BITS = 24
_WORD_BYTES = 4


class Huffman(SegmentCoder):
    """A whole number of bits a token. A segment is a string of bits, the highest first, in words of 32 bits."""

    name = "huffman"

    def __init__(self, vocabulary_size: int, tokens: np.ndarray, lengths: np.ndarray) -> None:
        super().__init__(vocabulary_size)
        self.tokens, self.lengths = tokens, lengths
        self.longest = int(lengths.max())
        order = np.lexsort((tokens, lengths))
        spans = np.int64(1) << (self.longest - lengths[order])
        self._codes = np.empty(len(tokens), np.int64)
        self._codes[order] = (np.cumsum(spans) - spans) >> (self.longest - lengths[order])
        # every code's row is repeated for all that may follow it: (place in the order) x 32 + length
        table = np.zeros(1 << self.longest, np.uint32)
        rows = np.repeat((np.arange(len(order)) << 5 | lengths[order]).astype(np.uint32), spans)
        table[: len(rows)] = rows
        self._table = table
        self._token_at = tokens[order].astype(self.dtype)

    @classmethod
    def fit(cls, tokens: np.ndarray, vocabulary_size: int) -> Self:
        """See SegmentCoder.fit."""
        counts = token_counts(tokens, vocabulary_size).numpy()
        present = np.flatnonzero(counts)
        limit = max(LONGEST, len(present).bit_length() + 2)
        return cls(vocabulary_size, present, code_lengths(counts[present], min(limit, MOST_BITS)))

    def to_bytes(self) -> bytes:
        """See SegmentCoder.to_bytes."""
        return pack(self.tokens, self.lengths)

    @classmethod
    def from_bytes(cls, data: bytes, vocabulary_size: int) -> Self:
        """See SegmentCoder.from_bytes."""
        tokens, lengths = unpack(data, vocabulary_size)
        if (lengths < 1).any() or (lengths > MOST_BITS).any() or (np.int64(1) << (MOST_BITS - lengths)).sum() > 1 << 24:
            raise DamagedStream("the code lengths of its model are impossible")
        return cls(vocabulary_size, tokens, lengths)

    def encode(self, tokens: np.ndarray) -> Coded:
        """See SegmentCoder.encode."""
        index = index_of(self.tokens, tokens)
        lengths = self.lengths[index]
        ends = lengths.cumsum(axis=1)
        num_words = -(-ends[:, -1] // 32)
        first_word = np.cumsum(num_words) - num_words
        at = (ends - lengths) + first_word[:, None] * 32
        shifted = self._codes[index].astype(np.uint64) << (64 - lengths - (at & 31)).astype(np.uint64)
        words = np.zeros(int(num_words.sum()) + 1, np.uint32)
        np.bitwise_or.at(words, at >> 5, (shifted >> np.uint64(32)).astype(np.uint32))
        np.bitwise_or.at(words, (at >> 5) + 1, shifted.astype(np.uint32))
        return words[:-1].astype("<u4").tobytes(), num_words * _WORD_BYTES

    def decode(self, payload: np.ndarray, offsets: np.ndarray, num_tokens: int) -> np.ndarray:
        """See SegmentCoder.decode."""
        if (offsets % _WORD_BYTES).any() or offsets[-1] > len(payload):
            raise DamagedStream("a segment has an impossible length")
        words = np.ascontiguousarray(payload[: offsets[-1]]).view("<u4").astype(np.uint64)
        words = np.concatenate([words, np.zeros(2, np.uint64)])
        pairs = words[:-1] << np.uint64(32) | words[1:]
        at, ends = offsets[:-1] * 8, offsets[1:] * 8
        places = np.empty((num_tokens, len(at)), np.uint32)
        unread = np.uint64(64 - self.longest)
        for step in range(num_tokens):
            window = pairs.take(at >> 5, mode="clip") << (at & 31).view(np.uint64)
            entries = self._table.take((window >> unread).view(np.int64))
            np.right_shift(entries, 5, out=places[step])
            at = at + (entries & 31)
        if ((ends - at) >> 5).any():  # not within the last word, or beyond it
            raise DamagedStream("a segment does not end where it must")
        return self._token_at.take(places.T)


def code_lengths(counts: np.ndarray, limit: int) -> np.ndarray:
    """Lengths [A], at most ``limit`` bits, of a prefix code that makes sum(counts x lengths) least; 1 where A = 1.

    Raises ValueError where 2^limit < A.
    """
    size = len(counts)
    if size > 1 << limit:
        raise ValueError(f"{size} tokens have no code of at most {limit} bits")
    if size == 1:
        return np.ones(1, np.int64)
    order = np.argsort(counts, kind="stable")
    leaves = counts[order].astype(np.int64)
    packages = np.empty(0, np.int64)
    is_leaf = []
    for _ in range(limit):
        row = np.concatenate([leaves, packages])
        merged = np.argsort(row, kind="stable")
        is_leaf.append(merged < size)
        row = row[merged]
        packages = row[0 : len(row) // 2 * 2 : 2] + row[1::2]
    lengths = np.zeros(size, np.int64)
    taken = 2 * size - 2
    for row in reversed(is_leaf):
        num_leaves = int(row[:taken].sum())
        lengths[:num_leaves] += 1
        taken = 2 * (taken - num_leaves)
    result = np.empty(size, np.int64)
    result[order] = lengths
    return result
