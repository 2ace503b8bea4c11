"""The static model of a token stream: which tokens occur, and how often as integers that sum to a power of two."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from vocabfold.coding.damage import DamagedStream
from vocabfold.tokens import token_counts

BITS = 20  # frequencies of a static model sum to 2^20, or to more where the alphabet is large
MAX_BITS = 24
_COLUMN_BYTES = 4


@dataclass(frozen=True)
class Frequencies:
    """``tokens`` [A] rising ids that occur, ``frequencies`` [A] at least 1 each, their sum 2^bits."""

    tokens: np.ndarray
    frequencies: np.ndarray
    bits: int

    @property
    def starts(self) -> np.ndarray:
        """[A] the sum of the frequencies before each token's own."""
        return np.cumsum(self.frequencies) - self.frequencies

    def to_bytes(self) -> bytes:
        """See ``pack``."""
        return pack(self.tokens, self.frequencies)

    @staticmethod
    def from_bytes(data: bytes, vocabulary_size: int) -> Frequencies:
        """The inverse of ``to_bytes``. Raises DamagedStream for bytes that are no model of this vocabulary."""
        tokens, frequencies = unpack(data, vocabulary_size)
        bits = int(frequencies.sum()).bit_length() - 1
        if (frequencies < 1).any() or frequencies.sum() != 1 << bits or not 1 <= bits <= MAX_BITS:
            raise DamagedStream("the frequencies of its model are damaged")
        return Frequencies(tokens, frequencies, bits)


def count_frequencies(tokens: np.ndarray, vocabulary_size: int) -> Frequencies:
    """The model of ``tokens`` [n >= 1], ids below ``vocabulary_size``."""
    counts = token_counts(tokens, vocabulary_size).numpy()
    present = np.flatnonzero(counts)
    bits = max(BITS, min(MAX_BITS, len(present).bit_length() + 3))
    return Frequencies(present, quantised(counts[present], bits), bits)


def quantised(counts: np.ndarray, bits: int) -> np.ndarray:
    """Integers of at least 1 that sum to 2^bits, near to ``counts`` [A] (each >= 1) in proportion.

    What rounding leaves over is given to, or taken from, the tokens whose code lengths it changes least. Only exactly
    rounded operations: the same numbers on every machine. Raises ValueError where 2^bits < A.
    """
    total = 1 << bits
    if len(counts) > total:
        raise ValueError(f"{len(counts)} frequencies of at least 1 do not sum to {total}")
    frequencies = np.maximum(1, np.rint(counts * (total / counts.sum())).astype(np.int64))
    while (excess := int(frequencies.sum()) - total) != 0:
        step = 1 if excess > 0 else -1
        able = np.flatnonzero(frequencies > step)
        # the change of -count * log(frequency), to second order
        cost = step * counts[able] / (frequencies[able] - step / 2)
        frequencies[able[np.argsort(cost, kind="stable")[: abs(excess)]]] -= step
    return frequencies


def pack(tokens: np.ndarray, values: np.ndarray) -> bytes:
    """Rising ids [A] and a value below 2^32 for each: gaps and values, byte plane by byte plane, deflated."""
    columns = np.stack([np.diff(tokens, prepend=0), values]).astype("<u4")
    planes = columns.view(np.uint8).reshape(2, -1, _COLUMN_BYTES).transpose(0, 2, 1)
    return zlib.compress(planes.tobytes(), 9)


def unpack(data: bytes, vocabulary_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of ``pack``, int64 both. Takes memory for V tokens at most. Raises DamagedStream."""
    unpacker = zlib.decompressobj()
    try:
        plain = unpacker.decompress(data, 2 * _COLUMN_BYTES * vocabulary_size + 1)
    except zlib.error as error:
        raise DamagedStream(f"its model cannot be unpacked ({error})") from error
    size, rest = divmod(len(plain), 2 * _COLUMN_BYTES)
    if not unpacker.eof or unpacker.unused_data or rest or size < 1:
        raise DamagedStream("its model has an impossible length")
    planes = np.frombuffer(plain, np.uint8).reshape(2, _COLUMN_BYTES, size).transpose(0, 2, 1)
    gaps, values = np.ascontiguousarray(planes).view("<u4")[..., 0].astype(np.int64)
    tokens = gaps.cumsum()
    if (gaps[1:] < 1).any() or tokens[-1] >= vocabulary_size:
        raise DamagedStream("its model is of another vocabulary or damaged")
    return tokens, values


def index_of(alphabet: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The place of each token in the rising ids ``alphabet`` [A]; ValueError for one that is not there."""
    place = np.minimum(np.searchsorted(alphabet, tokens), len(alphabet) - 1)
    if (alphabet[place] != tokens).any():
        raise ValueError("a token does not occur in the stream that the model was counted on")
    return place
