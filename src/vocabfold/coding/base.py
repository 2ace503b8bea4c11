"""The contract of a token coder, and the coders that spend the same on every token or on every run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import numpy as np
import pyarrow

from vocabfold.coding.damage import DamagedStream
from vocabfold.tokens import token_dtype

Coded = tuple[bytes, np.ndarray]  # the bytes of some segments, one after the other, and the length of each


class SegmentCoder(ABC):
    """Codes segments, equally long pieces of a token stream, each so that it can be decoded without the others.

    What a coder must know of the whole stream is its model, ``to_bytes``. Its ids are below ``vocabulary_size``.
    """

    name: ClassVar[str]
    segment_tokens: ClassVar[int] = 4096  # the longer, the less each segment's own bytes weigh
    segments_at_once: ClassVar[int] = 2048  # bounds memory, and fits a processor's cache

    def __init__(self, vocabulary_size: int) -> None:
        self.vocabulary_size = vocabulary_size
        self.dtype = token_dtype(vocabulary_size)

    @classmethod
    def fit(cls, tokens: np.ndarray, vocabulary_size: int) -> Self:
        """The coder of a stream ``tokens`` [n], n >= 1."""
        return cls(vocabulary_size)

    def to_bytes(self) -> bytes:
        """The model, for ``from_bytes``."""
        return b""

    @classmethod
    def from_bytes(cls, data: bytes, vocabulary_size: int) -> Self:
        """The inverse of ``to_bytes``. Raises DamagedStream."""
        if data:
            raise DamagedStream(f"the coder {cls.name} has no model, but {len(data)} bytes of one are there")
        return cls(vocabulary_size)

    def working_bytes(self, num_tokens: int) -> int:
        """Memory of decoding a segment of ``num_tokens``, beside the tokens; 0 where it is of no account."""
        return 0

    @abstractmethod
    def encode(self, tokens: np.ndarray) -> Coded:
        """``tokens`` [segments, n] of the fitted stream."""

    @abstractmethod
    def decode(self, payload: np.ndarray, offsets: np.ndarray, num_tokens: int) -> np.ndarray:
        """[segments, num_tokens] from ``payload`` uint8; segment i is payload[offsets[i]:offsets[i + 1]].

        Raises DamagedStream for bytes that are seen not to come from ``encode``; the container's checksums see the
        rest.
        """


class EachSegment(SegmentCoder):
    """A coder that takes one segment at a time."""

    @abstractmethod
    def encode_one(self, tokens: np.ndarray) -> bytes:
        """``tokens`` [n]."""

    @abstractmethod
    def decode_one(self, data: np.ndarray, num_tokens: int) -> np.ndarray:
        """[num_tokens] from ``data`` uint8. Raises DamagedStream."""

    def encode(self, tokens: np.ndarray) -> Coded:
        """See SegmentCoder.encode."""
        parts = [self.encode_one(segment) for segment in tokens]
        return b"".join(parts), np.array([len(part) for part in parts])

    def decode(self, payload: np.ndarray, offsets: np.ndarray, num_tokens: int) -> np.ndarray:
        """See SegmentCoder.decode."""
        tokens = np.empty((len(offsets) - 1, num_tokens), self.dtype)
        for row, start, stop in zip(tokens, offsets[:-1], offsets[1:], strict=True):
            row[:] = self.decode_one(payload[start:stop], num_tokens)
        return tokens


def id_bits(vocabulary_size: int) -> int:
    """Bits of an id below V, at least 1."""
    return max(1, (vocabulary_size - 1).bit_length())


def pack_bits(values: np.ndarray, width: int) -> bytes:
    """``values`` [n] below 2^width, ``width`` bits each, the highest first."""
    bits = np.unpackbits(values.astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)[:, 32 - width :]
    return np.packbits(bits).tobytes()


def unpack_bits(data: np.ndarray, width: int, count: int) -> np.ndarray:
    """The inverse of ``pack_bits``: ``count`` values, uint32. Raises DamagedStream unless ``data`` is that long."""
    if len(data) != -(-count * width // 8):
        raise DamagedStream("a packed segment has an impossible length")
    bits = np.unpackbits(data, count=count * width).reshape(count, width)
    padded = np.zeros((count, 32), np.uint8)
    padded[:, 32 - width :] = bits
    return np.packbits(padded, axis=1).view(">u4")[:, 0].astype(np.uint32)


class Raw(EachSegment):
    """The ids as they are, 16 bits where V <= 65,536, else 32."""

    name = "raw"

    def encode_one(self, tokens: np.ndarray) -> bytes:
        """See EachSegment.encode_one."""
        return tokens.astype(self.dtype).tobytes()

    def decode_one(self, data: np.ndarray, num_tokens: int) -> np.ndarray:
        """See EachSegment.decode_one."""
        if len(data) != num_tokens * self.dtype.itemsize:
            raise DamagedStream("a raw segment has an impossible length")
        return np.frombuffer(data, self.dtype)


class BitPack(EachSegment):
    """ceil(log2 V) bits a token."""

    name = "bitpack"

    def encode_one(self, tokens: np.ndarray) -> bytes:
        """See EachSegment.encode_one."""
        return pack_bits(tokens, id_bits(self.vocabulary_size))

    def decode_one(self, data: np.ndarray, num_tokens: int) -> np.ndarray:
        """See EachSegment.decode_one."""
        return unpack_bits(data, id_bits(self.vocabulary_size), num_tokens)


class RunLength(EachSegment):
    """Runs of one token: their number (4 bytes), the width of a length (1 byte), the lengths, the tokens, packed."""

    name = "run_length"

    def encode_one(self, tokens: np.ndarray) -> bytes:
        """See EachSegment.encode_one."""
        starts = np.flatnonzero(np.diff(tokens.astype(np.int64), prepend=-1))
        lengths = np.diff(starts, append=len(tokens)) - 1
        width = max(1, int(lengths.max()).bit_length())
        head = len(starts).to_bytes(4, "little") + bytes([width])
        return head + pack_bits(lengths, width) + pack_bits(tokens[starts], id_bits(self.vocabulary_size))

    def decode_one(self, data: np.ndarray, num_tokens: int) -> np.ndarray:
        """See EachSegment.decode_one."""
        num_runs = int.from_bytes(data[:4].tobytes(), "little")
        if len(data) < 5 or not 1 <= num_runs <= num_tokens or not 1 <= data[4] <= 32:
            raise DamagedStream("a segment of runs has an impossible head")
        width = int(data[4])
        middle = 5 + -(-num_runs * width // 8)
        lengths = unpack_bits(data[5:middle], width, num_runs).astype(np.int64) + 1
        if lengths.sum() != num_tokens:
            raise DamagedStream("the runs of a segment do not add up")
        return np.repeat(unpack_bits(data[middle:], id_bits(self.vocabulary_size), num_runs), lengths)


class Zstandard(EachSegment):
    """The general compressor that one would reach for, on the raw ids; the yardstick of the others."""

    name = "zstd"
    segment_tokens = 1 << 16  # it finds repetitions within a segment only
    segments_at_once = 64
    level: ClassVar[int] = 19

    def encode_one(self, tokens: np.ndarray) -> bytes:
        """See EachSegment.encode_one."""
        codec = pyarrow.Codec("zstd", compression_level=self.level)
        return codec.compress(tokens.astype(self.dtype).tobytes(), asbytes=True)

    def decode_one(self, data: np.ndarray, num_tokens: int) -> np.ndarray:
        """See EachSegment.decode_one."""
        try:
            plain = pyarrow.decompress(data, num_tokens * self.dtype.itemsize, "zstd", asbytes=True)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DamagedStream(f"a zstd segment cannot be unpacked ({error})") from error
        return np.frombuffer(plain, self.dtype)
