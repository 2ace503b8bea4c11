"""Coded tokens as bytes: a header, the model, a table of segments, checksums, and the segments.

    magic VFTC, version, coder, 2 unused bytes | V, segment tokens, bytes of the model, CRC-32 of the tokens (4 bytes
    each) | number of tokens (8) | model, filled up to 4 bytes | length of each segment (4) | CRC-32 of each block of
    64 segments (4) | CRC-32 of all so far (4) | segments

All little endian. Whatever bytes it is given, a decoder takes memory for at most TOKENS_PER_BYTE tokens for each of
them, and beside that at most WORKING_BYTES, on all its threads together.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vocabfold.coding.base import SegmentCoder
from vocabfold.coding.coders import CODERS
from vocabfold.coding.damage import DamagedStream
from vocabfold.errors import UserError
from vocabfold.limits import usable_cores

MAGIC = b"VFTC"
VERSION = 1
TOKENS_PER_BYTE = 1 << 12  # zstd comes nearest, with 2^16 equal tokens in some 24 bytes
WORKING_BYTES = 512 << 20  # of models, and of what is counted while decoding
SEGMENTS_PER_BLOCK = 64
MAX_VOCABULARY_SIZE = 1 << 22  # the largest model takes 400 MiB
_HEADER = struct.Struct("<4sBBHIIIIQ")


def encode(tokens: np.ndarray, vocabulary_size: int, coder: str = "rans") -> bytes:
    """``tokens`` [n], ids below V, as bytes. Raises UserError for an unknown coder or an id that V does not have."""
    if coder not in CODERS:
        raise UserError(f"unknown token coder {coder!r}: choose one of {', '.join(CODERS)}")
    if not 1 <= vocabulary_size <= MAX_VOCABULARY_SIZE:
        raise UserError(f"a vocabulary of {vocabulary_size} cannot be coded: it must be 1 to {MAX_VOCABULARY_SIZE}")
    tokens = np.asarray(tokens)
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary_size):
        raise UserError(f"token ids must be 0 to {vocabulary_size - 1}, the vocabulary's last")
    kind = CODERS[coder]
    model, parts, sizes = b"", list[bytes](), list[np.ndarray]()
    if tokens.size:
        fitted = kind.fit(tokens, vocabulary_size)
        model = fitted.to_bytes()
        for piece in _pieces(tokens, kind):
            data, lengths = fitted.encode(piece)
            parts.append(data)
            sizes.append(lengths)
    payload = np.frombuffer(b"".join(parts), np.uint8)
    lengths = np.concatenate([*sizes, np.empty(0, np.int64)]).astype("<u4")
    offsets = np.concatenate([[0], lengths.cumsum(dtype=np.int64)])
    checks = [zlib.crc32(payload[start:stop].data) for start, stop in _block_bounds(offsets)]
    checksum = tokens_crc32(tokens, fitted.dtype) if tokens.size else 0
    numbers = (vocabulary_size, kind.segment_tokens, len(model), checksum, tokens.size)
    head = _HEADER.pack(MAGIC, VERSION, list(CODERS).index(coder), 0, *numbers)
    head += model + bytes(-len(model) % 4) + lengths.tobytes() + np.array(checks, "<u4").tobytes()
    return head + zlib.crc32(head).to_bytes(4, "little") + payload.tobytes()


def decode(data: bytes | np.ndarray, vocabulary_size: int | None = None, threads: int | None = None) -> np.ndarray:
    """The tokens [n] that ``encode`` was given. ``threads`` None: one for each core.

    Raises DamagedStream, a UserError, for anything that ``encode`` did not write, or where V is another than
    ``vocabulary_size``.
    """
    return Container(data, vocabulary_size).decode(threads)


class Container:
    """Coded tokens, opened: the header, the model and the table are checked, segments are decoded when asked for."""

    coder: SegmentCoder

    def __init__(self, data: bytes | np.ndarray, vocabulary_size: int | None = None) -> None:
        buffer = np.frombuffer(data, np.uint8)
        if len(buffer) < _HEADER.size + 4:
            raise DamagedStream("these are no coded tokens: they end within their header")
        magic, version, coder, _, *numbers = _HEADER.unpack(buffer[: _HEADER.size].tobytes())
        self.vocabulary_size, segment_tokens, model_size, self.checksum, self.num_tokens = numbers
        if magic != MAGIC:
            raise DamagedStream("these are no coded tokens: they do not begin with VFTC")
        if version != VERSION:
            raise DamagedStream(f"the coded tokens are of version {version}, this program reads version {VERSION}")
        if coder >= len(CODERS):
            raise DamagedStream(f"the coded tokens name an unknown coder, {coder}")
        kind = list(CODERS.values())[coder]
        num_segments = -(-self.num_tokens // kind.segment_tokens)
        num_blocks = -(-num_segments // SEGMENTS_PER_BLOCK)
        model_end = _HEADER.size + model_size
        table_start = model_end + -model_size % 4
        table_end = table_start + 4 * num_segments
        start = table_end + 4 * num_blocks + 4
        # Python's integers do not overflow: a made-up number fails here, before any memory is taken for it
        if start > len(buffer) or self.num_tokens > TOKENS_PER_BYTE * len(buffer):
            raise DamagedStream("the coded tokens were cut short or changed: their table does not fit")
        head = buffer[: start - 4].tobytes()
        if zlib.crc32(head) != int.from_bytes(buffer[start - 4 : start].tobytes(), "little"):
            raise DamagedStream("the coded tokens were changed: their header fails its checksum")
        lengths = np.frombuffer(head, "<u4", num_segments, table_start)
        self._checks = np.frombuffer(head, "<u4", num_blocks, table_end)
        self._offsets = np.concatenate([[0], lengths.cumsum(dtype=np.int64)])
        self._payload = buffer[start:]
        if self._offsets[-1] != len(self._payload) or segment_tokens != kind.segment_tokens:
            raise DamagedStream("the coded tokens were cut short or changed: their segments do not fit")
        if not 1 <= self.vocabulary_size <= MAX_VOCABULARY_SIZE:
            raise DamagedStream(f"the coded tokens name an impossible vocabulary of {self.vocabulary_size}")
        if vocabulary_size is not None and vocabulary_size != self.vocabulary_size:
            raise DamagedStream(
                f"the coded tokens are of a vocabulary of {self.vocabulary_size}, not {vocabulary_size}"
            )
        self.segment_tokens, self.num_segments = segment_tokens, num_segments
        self.model_bytes, self.overhead_bytes = model_size, start - model_size
        if num_segments:
            self.coder = kind.from_bytes(head[_HEADER.size : model_end], self.vocabulary_size)
        self._is_checked = np.zeros(num_blocks, bool)

    def __len__(self) -> int:
        return self.num_tokens

    def decode(self, threads: int | None = None) -> np.ndarray:
        """All tokens [n], checked against the checksum of what was encoded. On fewer ``threads`` where they would need
        more than WORKING_BYTES."""
        if self.num_segments == 0:
            return np.empty(0, np.uint16)
        whole = np.arange(self.num_segments)
        # never smaller parts for the sake of threads: with few lanes they only wait for the interpreter's lock
        at_once = self.coder.segments_at_once
        parts = [whole[start : start + at_once] for start in range(0, len(whole), at_once)]
        tokens = np.empty(self.num_segments * self.segment_tokens, self.coder.dtype)
        rows = tokens.reshape(-1, self.segment_tokens)

        def fill(part: np.ndarray) -> None:
            rows[part] = self.segments(part)

        threads = threads or usable_cores()
        if working_bytes := self.coder.working_bytes(min(self.segment_tokens, self.num_tokens)):
            threads = max(1, min(threads, WORKING_BYTES // working_bytes))
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, parts))
        tokens = tokens[: self.num_tokens]
        if tokens_crc32(tokens, self.coder.dtype) != self.checksum:
            raise DamagedStream(
                "the decoded tokens fail their checksum: another version wrote them, or they are damaged"
            )
        return tokens

    def segments(self, wanted: np.ndarray) -> np.ndarray:
        """[len(wanted), segment_tokens] of the segments ``wanted``, rising numbers; what is past the end is 0.

        Raises DamagedStream where the bytes of one of their blocks fail their checksum.
        """
        self._check_blocks(np.unique(wanted // SEGMENTS_PER_BLOCK))
        tokens = np.zeros((len(wanted), self.segment_tokens), self.coder.dtype)
        last = self.num_tokens - (self.num_segments - 1) * self.segment_tokens
        num_whole = len(wanted) - int(last < self.segment_tokens and wanted[-1] == self.num_segments - 1)
        for rows, num_tokens in ((slice(0, num_whole), self.segment_tokens), (slice(num_whole, len(wanted)), last)):
            if len(numbers := wanted[rows]):
                tokens[rows, :num_tokens] = self.coder.decode(*self._gathered(numbers), num_tokens)
        if tokens.size and int(tokens.max()) >= self.vocabulary_size:
            raise DamagedStream("the coded tokens hold an id outside their vocabulary")
        return tokens

    def _gathered(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(payload, offsets) of some segments, contiguous."""
        starts, stops = self._offsets[numbers], self._offsets[numbers + 1]
        offsets = np.concatenate([[0], (stops - starts).cumsum()])
        if stops[-1] - starts[0] == offsets[-1]:
            return self._payload[starts[0] : stops[-1]], offsets
        parts = [self._payload[start:stop] for start, stop in zip(starts, stops, strict=True)]
        return np.concatenate(parts), offsets

    def _check_blocks(self, blocks: np.ndarray) -> None:
        bounds = _block_bounds(self._offsets)
        for block in blocks[~self._is_checked[blocks]]:
            start, stop = bounds[block]
            if zlib.crc32(self._payload[start:stop].data) != self._checks[block]:
                raise DamagedStream(f"the coded tokens were changed: block {block} fails its checksum")
            self._is_checked[block] = True


def tokens_crc32(tokens: np.ndarray, dtype: np.dtype) -> int:
    """CRC-32 of ids as a token file of their vocabulary holds them."""
    return zlib.crc32(np.ascontiguousarray(tokens, dtype).data)


def _pieces(tokens: np.ndarray, kind: type[SegmentCoder]) -> Iterator[np.ndarray]:
    """[segments, segment tokens] each, and the shorter rest as the last."""
    size = kind.segment_tokens
    whole = len(tokens) // size * size
    rows = tokens[:whole].reshape(-1, size)
    for start in range(0, len(rows), kind.segments_at_once):
        yield rows[start : start + kind.segments_at_once]
    if whole < len(tokens):
        yield tokens[None, whole:]


def _block_bounds(offsets: np.ndarray) -> list[tuple[int, int]]:
    edges = [*offsets[:-1:SEGMENTS_PER_BLOCK].tolist(), int(offsets[-1])]
    return list(itertools.pairwise(edges))
