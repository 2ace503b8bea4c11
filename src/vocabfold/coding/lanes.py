"""Range asymmetric numeral systems (Duda, arXiv 1311.2540) over many independent lanes side by side, in numpy.

A symbol is an interval [start, start + frequency) of [0, 2^bits); coding it costs bits - log2(frequency). Step t of all
lanes is one set of vector operations on their states, which stay in [2^28, 2^60) and exchange 32-bit words with their
lane's stream. Integers only: the same numbers on every machine.

A lane's bytes, little endian: its last state (8 bytes), then its words (4 bytes each) in the order they are read.
"""

from __future__ import annotations

import numpy as np

from vocabfold.coding.damage import DamagedStream

MAX_BITS = 24  # at most one word moves in a step as long as bits <= 28; the rest is room for exactness
STATE_BYTES = 8
WORD_BYTES = 4
_LOW = np.uint64(1 << 28)
_WORD = np.uint64(32)
_WORD_MASK = np.uint64(0xFFFFFFFF)


class LaneEncoder:
    """Takes the steps of ``num_lanes`` lanes in reverse order, the last first."""

    def __init__(self, num_lanes: int, num_steps: int) -> None:
        self.state = np.full(num_lanes, _LOW)
        self._num_steps = num_steps
        # written from the end: what was encoded last is read first
        self._words = np.empty((num_lanes, num_steps), "<u4")
        self._first = np.full(num_lanes, num_steps)

    def push(self, start: np.ndarray, frequency: np.ndarray, bits: int, lanes: np.ndarray | None = None) -> None:
        """One symbol for each lane, or for the ``lanes`` named; both arrays uint64, frequency >= 1."""
        state = self.state if lanes is None else self.state[lanes]
        full = np.flatnonzero(state >= frequency << np.uint64(60 - bits))
        if len(full):
            rows = full if lanes is None else lanes[full]
            self._first[rows] -= 1
            self._words[rows, self._first[rows]] = state[full] & _WORD_MASK
            state[full] >>= _WORD
        quotient = state // frequency
        state = (quotient << np.uint64(bits)) + (state - quotient * frequency) + start
        if lanes is None:
            self.state = state
        else:
            self.state[lanes] = state

    def finish(self) -> tuple[bytes, np.ndarray]:
        """(the bytes of all lanes, one after the other; their lengths [num_lanes])."""
        columns = np.concatenate([self.state.astype("<u8").view("<u4").reshape(-1, 2), self._words], axis=1)
        kept = np.arange(self._num_steps) >= self._first[:, None]
        kept = np.concatenate([np.ones((len(kept), 2), bool), kept], axis=1)
        return columns[kept].tobytes(), kept.sum(axis=1) * WORD_BYTES


class LaneDecoder:
    """Gives the steps back, the first first. ``payload`` uint8, ``offsets`` [lanes + 1]: where each lane's bytes lie.

    Raises DamagedStream for lanes that no encoder wrote.
    """

    def __init__(self, payload: np.ndarray, offsets: np.ndarray) -> None:
        sizes = np.diff(offsets)
        if (sizes < STATE_BYTES).any() or (offsets % WORD_BYTES).any() or offsets[-1] > len(payload):
            raise DamagedStream("a lane has an impossible length")
        words = np.ascontiguousarray(payload[: offsets[-1]]).view("<u4")
        first = offsets[:-1] // WORD_BYTES
        self.state = words[first].astype(np.uint64) | words[first + 1].astype(np.uint64) << _WORD
        self._next = first + 2
        self._end = offsets[1:] // WORD_BYTES
        # a damaged lane may read on until ``check`` or ``finish`` notices
        self._words = np.concatenate([words, np.zeros(1, "<u4")]).astype(np.uint64)

    def peek(self, bits: int, lanes: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Where in [0, 2^bits) the next symbol of each lane lies, int64."""
        return (self.state[lanes] & np.uint64((1 << bits) - 1)).view(np.int64)

    def pop(self, start: np.ndarray, frequency: np.ndarray, bits: int, lanes: np.ndarray | slice = slice(None)) -> None:
        """Leave behind the symbols with these intervals (uint64), which hold what ``peek`` gave."""
        state = self.state[lanes]
        place = state & np.uint64((1 << bits) - 1)
        state = (state >> np.uint64(bits)) * frequency + place - start
        empty = np.flatnonzero(state < _LOW)
        if len(empty):
            rows = (
                empty if isinstance(lanes, slice) and lanes == slice(None) else np.arange(len(self.state))[lanes][empty]
            )
            places = self._next[rows]
            state[empty] = (state[empty] << _WORD) | self._words.take(places, mode="clip")
            self._next[rows] = places + 1
        self.state[lanes] = state

    def check(self) -> None:
        """Raise DamagedStream where a lane has read beyond its end: after some steps, it saves decoding the rest."""
        if (self._next > self._end).any():
            raise DamagedStream("a lane ends too early")

    def finish(self) -> None:
        """Raise DamagedStream unless every lane ends in the state it began with and all its words were read."""
        if (self.state != _LOW).any() or (self._next != self._end).any():
            raise DamagedStream("a lane does not end where it must")
