"""Static coders on lanes, one lane a segment: whole tokens, and the two-symbol form of a folded vocabulary."""

from __future__ import annotations

import math
from typing import Self

import numpy as np

from vocabfold.coding.base import Coded, SegmentCoder
from vocabfold.coding.frequencies import Frequencies, count_frequencies, index_of, quantised
from vocabfold.coding.lanes import LaneDecoder, LaneEncoder

_SHIFT = np.uint64(32)
_LOW_HALF = np.uint64(0xFFFFFFFF)


class StaticCoder(SegmentCoder):
    """What the coders with counted frequencies share: the model, and the alphabet in the order of its frequency."""

    def __init__(self, vocabulary_size: int, model: Frequencies) -> None:
        super().__init__(vocabulary_size)
        self.model = model

    @classmethod
    def fit(cls, tokens: np.ndarray, vocabulary_size: int) -> Self:
        """See SegmentCoder.fit."""
        return cls(vocabulary_size, count_frequencies(tokens, vocabulary_size))

    def to_bytes(self) -> bytes:
        """See SegmentCoder.to_bytes."""
        return self.model.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes, vocabulary_size: int) -> Self:
        """See SegmentCoder.from_bytes."""
        return cls(vocabulary_size, Frequencies.from_bytes(data, vocabulary_size))


class Intervals:
    """Tables of one or several alphabets [A, size] with frequencies that sum to 2^bits in each row."""

    def __init__(self, frequencies: np.ndarray, bits: int) -> None:
        starts = np.cumsum(frequencies, axis=-1) - frequencies
        self.bits = bits
        # one look-up for both: start in the upper half, frequency in the lower
        self.packed = (starts.astype(np.uint64) << _SHIFT | frequencies.astype(np.uint64)).ravel()
        symbols = np.arange(frequencies.size)
        dtype = np.min_scalar_type(max(1, frequencies.size - 1))
        self.symbol_at = np.repeat(symbols.astype(dtype), frequencies.ravel())  # [rows x 2^bits]

    def of(self, symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(start, frequency), uint64 both."""
        packed = self.packed.take(symbols)
        return packed >> _SHIFT, packed & _LOW_HALF

    def next_symbols(self, decoder: LaneDecoder, rows: np.ndarray | None = None) -> np.ndarray:
        """One symbol of each lane, from the alphabets ``rows`` [lanes]; counted through all rows."""
        place = decoder.peek(self.bits)
        if rows is not None:
            place += rows << self.bits
        symbols = self.symbol_at.take(place)
        decoder.pop(*self.of(symbols), self.bits)
        return symbols


class Rans(StaticCoder):
    """Each token one symbol: within a thousandth of the entropy of the counts."""

    name = "rans"

    def __init__(self, vocabulary_size: int, model: Frequencies) -> None:
        super().__init__(vocabulary_size, model)
        self.intervals = Intervals(model.frequencies, model.bits)
        self._token_of = model.tokens.astype(self.dtype)

    def encode(self, tokens: np.ndarray) -> Coded:
        """See SegmentCoder.encode."""
        symbols = np.ascontiguousarray(index_of(self.model.tokens, tokens).T)
        encoder = LaneEncoder(len(tokens), len(symbols))
        for step in symbols[::-1]:
            encoder.push(*self.intervals.of(step), self.intervals.bits)
        return encoder.finish()

    def decode(self, payload: np.ndarray, offsets: np.ndarray, num_tokens: int) -> np.ndarray:
        """See SegmentCoder.decode."""
        decoder = LaneDecoder(payload, offsets)
        symbols = np.empty((num_tokens, len(offsets) - 1), self.intervals.symbol_at.dtype)
        for step in range(num_tokens):
            symbols[step] = self.intervals.next_symbols(decoder)
        decoder.finish()
        return self._token_of.take(symbols.T)


class FoldedRans(StaticCoder):
    """Group, then slot: two symbols from alphabets of about sqrt A each, the A tokens ordered by falling frequency.

    As in a folded head, P(v) = P(g) P(t|g), and both tables are small; a symbol more is the price.
    """

    name = "folded"
    group_bits = 16
    slot_bits = 14

    def __init__(self, vocabulary_size: int, model: Frequencies) -> None:
        super().__init__(vocabulary_size, model)
        order = np.argsort(-model.frequencies, kind="stable")
        self.num_slots = math.ceil(math.sqrt(len(order)))
        num_groups = -(-len(order) // self.num_slots)
        counts = np.zeros((num_groups, self.num_slots), np.int64)
        counts.ravel()[: len(order)] = model.frequencies[order]
        slots = np.zeros_like(counts)
        for group, row in enumerate(counts):
            exists = row > 0
            slots[group, exists] = quantised(row[exists], self.slot_bits)
        self.groups = Intervals(quantised(counts.sum(axis=1), self.group_bits), self.group_bits)
        self.slots = Intervals(slots, self.slot_bits)
        self._position = np.empty(len(order), np.int64)
        self._position[order] = np.arange(len(order))
        self._token_at = model.tokens[order].astype(self.dtype)

    def encode(self, tokens: np.ndarray) -> Coded:
        """See SegmentCoder.encode."""
        positions = np.ascontiguousarray(self._position[index_of(self.model.tokens, tokens)].T)
        encoder = LaneEncoder(len(tokens), 2 * len(positions))
        for step in positions[::-1]:
            encoder.push(*self.slots.of(step), self.slots.bits)
            encoder.push(*self.groups.of(step // self.num_slots), self.groups.bits)
        return encoder.finish()

    def decode(self, payload: np.ndarray, offsets: np.ndarray, num_tokens: int) -> np.ndarray:
        """See SegmentCoder.decode."""
        decoder = LaneDecoder(payload, offsets)
        positions = np.empty((num_tokens, len(offsets) - 1), self.slots.symbol_at.dtype)
        for step in range(num_tokens):
            groups = self.groups.next_symbols(decoder).astype(np.int64)
            positions[step] = self.slots.next_symbols(decoder, groups)
        decoder.finish()
        return self._token_at.take(positions.T)
