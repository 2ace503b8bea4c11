"""Adaptive coding without a model in the file: both sides count what they have seen, in contexts of 0 to 2 tokens.

A token is the path of its bits, highest first; each step of the path is one binary decision. Counts of longer contexts
lean on those of shorter ones, as in context tree weighting and PPM (Willems 1995; Cleary and Witten 1984):

    p_0 = (ones + 0.4) / (total + 0.8)        p_k = (ones_k + PRIORS[k] p_{k-1}) / (total_k + PRIORS[k])

A stream is cut into lanes that are coded side by side and share the counts; a step of all lanes sees what all lanes
coded before it. Probabilities come from +, x and / of float64 alone, which are the same on every machine.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from vocabfold.coding.base import EachSegment, id_bits
from vocabfold.coding.lanes import LaneDecoder, LaneEncoder

PRIORS = (1.0, 4.0)  # how many observations the shorter context weighs
BITS = 16  # of a decision's probability
LANES = 256
TOKENS_PER_LANE = 512  # a short stream has fewer lanes: each costs about 6 bytes
MOST_TABLE_BITS = 24  # of the hashed contexts: 128 MiB for each order, less for a segment of less than 2^20 tokens
_COUNT = np.dtype(np.uint32)
_MULTIPLIERS = tuple(np.uint64(odd) for odd in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))


class Counts:
    """What was seen in each context: ``order`` previous tokens and the path so far."""

    def __init__(self, order: int, path_bits: int, num_tokens: int) -> None:
        sizes = table_sizes(order, path_bits, num_tokens)
        self._shift = np.uint64(65 - sizes[-1].bit_length())
        self.ones = [np.zeros(size, _COUNT) for size in sizes]
        self.total = [np.zeros(size, _COUNT) for size in sizes]
        self.places: list[np.ndarray] = []

    def start(self, past: list[np.ndarray]) -> None:
        """A new token in each lane after ``past``: the last token [lanes], the one before it, ..., as uint64."""
        self._hashes: list[np.ndarray] = []
        hashed = np.zeros(1, np.uint64)
        for token, multiplier in zip(past, _MULTIPLIERS, strict=False):
            hashed = hashed + (token + np.uint64(1)) * multiplier
            self._hashes.append(hashed ^ hashed >> np.uint64(29))

    def frequency(self, path: np.ndarray) -> np.ndarray:
        """2^BITS times the probability that the next bit of ``path`` [lanes] is one; from 1 to 2^BITS - 1, uint64."""
        self.places = [path]
        nodes = path.view(np.uint64) * _MULTIPLIERS[2]
        for hashed in self._hashes:
            place = (hashed + nodes) * _MULTIPLIERS[0] >> self._shift
            self.places.append(place.view(np.int64))
        probability = (self.ones[0].take(path) + 0.4) / (self.total[0].take(path) + 0.8)
        contexts = zip(self.ones[1:], self.total[1:], self.places[1:], PRIORS, strict=False)
        for ones, total, place, prior in contexts:
            probability = (ones.take(place) + prior * probability) / (total.take(place) + prior)
        return (probability * ((1 << BITS) - 2)).astype(np.uint64) + np.uint64(1)

    def add(self, bits: np.ndarray) -> None:
        """Count the bits [lanes] that followed the paths last asked for."""
        for ones, total, place in zip(self.ones, self.total, self.places, strict=True):
            np.add.at(ones, place, bits)
            np.add.at(total, place, np.uint32(1))


def table_sizes(order: int, path_bits: int, num_tokens: int) -> list[int]:
    """Places of the table of each order, from 0 to ``order``; a place is two counts."""
    return [1 << path_bits] + [1 << min(MOST_TABLE_BITS, num_tokens.bit_length() + 3)] * order


class Adaptive(EachSegment):
    """No context: the counts of the tokens so far."""

    name = "adaptive"
    segment_tokens = 1 << 20
    segments_at_once = 1
    order: ClassVar[int] = 0

    def working_bytes(self, num_tokens: int) -> int:
        """See SegmentCoder.working_bytes."""
        return 2 * _COUNT.itemsize * sum(table_sizes(self.order, id_bits(self.vocabulary_size), num_tokens))

    def encode_one(self, tokens: np.ndarray) -> bytes:
        """See EachSegment.encode_one. The lengths of the lanes (4 bytes each) come first."""
        num_steps, starts = _lanes(len(tokens))
        depth = id_bits(self.vocabulary_size)
        counts = Counts(self.order, depth, len(tokens))
        chosen, frequencies = [], []
        past = self._past(len(starts))
        for step in range(num_steps):
            current = tokens[starts[starts + step < len(tokens)] + step].astype(np.int64)
            past = [earlier[: len(current)] for earlier in past]
            counts.start(past)
            for shift in range(depth - 1, -1, -1):
                path = current >> (shift + 1) | 1 << (depth - 1 - shift)
                bits = (current >> shift & 1).astype(np.uint32)
                frequencies.append(counts.frequency(path).astype(np.uint16))
                chosen.append(bits.astype(bool))
                counts.add(bits)
            past = [current.view(np.uint64), *past[:-1]] if past else past
        encoder = LaneEncoder(len(starts), len(chosen))
        for bit, frequency in zip(reversed(chosen), reversed(frequencies), strict=True):
            lanes = None if len(bit) == len(starts) else np.arange(len(bit))
            encoder.push(*_interval(bit, frequency.astype(np.uint64)), BITS, lanes)
        data, sizes = encoder.finish()
        return sizes.astype("<u4").tobytes() + data

    def decode_one(self, data: np.ndarray, num_tokens: int) -> np.ndarray:
        """See EachSegment.decode_one."""
        num_steps, starts = _lanes(num_tokens)
        head = 4 * len(starts)
        sizes = np.frombuffer(data[:head].tobytes().ljust(head, b"\0"), "<u4")
        decoder = LaneDecoder(data[head:], np.concatenate([[0], sizes.cumsum(dtype=np.int64)]))
        depth = id_bits(self.vocabulary_size)
        counts = Counts(self.order, depth, num_tokens)
        tokens = np.empty(num_tokens, np.int64)
        past = self._past(len(starts))
        for step in range(num_steps):
            places = starts[starts + step < num_tokens] + step
            lanes = slice(None) if len(places) == len(starts) else slice(0, len(places))
            past = [earlier[: len(places)] for earlier in past]
            counts.start(past)
            path = np.ones(len(places), np.int64)
            for _ in range(depth):
                frequency = counts.frequency(path)
                bit = decoder.peek(BITS, lanes).view(np.uint64) < frequency
                decoder.pop(*_interval(bit, frequency), BITS, lanes)
                counts.add(bit.astype(np.uint32))
                path = path << 1 | bit
            decoder.check()
            tokens[places] = current = path - (1 << depth)
            past = [current.view(np.uint64), *past[:-1]] if past else past
        decoder.finish()
        return tokens

    def _past(self, num_lanes: int) -> list[np.ndarray]:
        return [np.full(num_lanes, self.vocabulary_size, np.uint64) for _ in range(self.order)]


class FirstOrder(Adaptive):
    """Mixed with the counts after each token."""

    name = "order1"
    order = 1


class SecondOrder(Adaptive):
    """Mixed also with the counts after each pair of tokens."""

    name = "order2"
    order = 2


def _lanes(num_tokens: int) -> tuple[int, np.ndarray]:
    """(steps, where each lane begins): lanes of equal length but for the last."""
    num_steps = -(-num_tokens // max(1, min(LANES, num_tokens // TOKENS_PER_LANE)))
    return num_steps, np.arange(0, num_tokens, num_steps)


def _interval(bit: np.ndarray, frequency: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    zero = np.uint64(1 << BITS) - frequency
    return np.where(bit, np.uint64(0), frequency), np.where(bit, frequency, zero)
