"""Files coded with a trained model, segment by segment, so that neither side holds more than a segment.

    magic VFTM, version, 3 unused bytes | fingerprint of the model (16) | fingerprint of the machine's arithmetic (8) |
    bytes of the text (8) | CRC-32 of all so far (4)
    then for each MiB of text: its bytes, its tokens, bytes of its code, CRC-32 of the text, CRC-32 of the code, CRC-32
    of these five numbers (4 bytes each), and the code

All little endian. A segment that the model does not make shorter than DEFLATE does, as one unlike any text, is stored
without it: it has 0 tokens, and its code is deflated or, where it is as long as the text, the text itself. No file
grows by more than its header and the numbers of its segments. A decoder takes memory for one segment, of at most a MiB
of text. Version 2; files of version 1, which had no stored segments, have to be made again.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from vocabfold.coding.damage import DamagedStream
from vocabfold.data.tokenizer import Tokenizer
from vocabfold.errors import UserError
from vocabfold.files import replacing
from vocabfold.inference.model_coder import (
    ModelSteps,
    TooLongError,
    decode_tokens,
    encode_tokens,
    most_rows,
    one_thread,
)
from vocabfold.inference.responses import fingerprint
from vocabfold.models.build import ModelWithHead

MAGIC = b"VFTM"
VERSION = 2
SEGMENT_BYTES = 1 << 20
_HEADER = struct.Struct("<4sB3x16s8sQ")
_SEGMENT = struct.Struct("<5I")
_CHECK_BYTES = 4
_PROBE_STEPS = 4
_PIECE_BYTES = 1 << 16  # of a segment go through the tokenizer at a time: a list of ids is many times as large
_PIECE_TOKENS = 1 << 13
Progress = Callable[[int, int], object]  # is told bytes of text that are done, and of the whole text
SegmentProgress = Callable[[int], object]  # bytes of the segment's text that are done


@dataclass(frozen=True)
class TextModel:
    """A trained model that codes text. ``fingerprint``: of its weights; ``arithmetic``: of the numbers that it computes
    on this machine; ``row_tokens`` and ``most_rows``: see ``num_rows``. Made by ``text_model``."""

    model: ModelWithHead
    tokenizer: Tokenizer
    fingerprint: bytes
    arithmetic: bytes
    most_rows: int
    row_tokens: int

    def num_rows(self, num_tokens: int) -> int:
        """How many stretches of ``num_tokens`` are coded side by side: none shorter than ``row_tokens``."""
        return max(1, min(self.most_rows, num_tokens // self.row_tokens))


def text_model(model: ModelWithHead, tokenizer: Tokenizer, rows: int | None = None, row_tokens: int = 1) -> TextModel:
    """``model``, on the CPU, with the tokenizer of its texts; ``rows`` None: as many as ``most_rows`` allows. Raises
    UserError where their vocabularies differ."""
    if model.head.vocabulary_size != tokenizer.vocabulary_size:
        raise UserError(
            f"the model has a vocabulary of {model.head.vocabulary_size} and the tokenizer {tokenizer.name} one of "
            f"{tokenizer.vocabulary_size}: data.tokenizer in the run's config.yaml is not what it was trained with"
        )
    words = f"{tokenizer.name} {fingerprint(model)}"
    if rows is not None or row_tokens > 1:
        words += f" {rows} {row_tokens}"
    digest = hashlib.sha256(words.encode()).digest()
    arithmetic = _arithmetic(model, tokenizer.end_token)
    return TextModel(model, tokenizer, digest[:16], arithmetic, rows or most_rows(model), row_tokens)


@torch.inference_mode()
def _arithmetic(model: ModelWithHead, end_token: int) -> bytes:
    """A digest of the integers of a few steps on a fixed text: it differs where another processor or version of torch
    adds in another order."""
    digest = hashlib.sha256()
    with one_thread():
        for num_rows in (1, 5):
            steps = ModelSteps(model, num_rows, end_token)
            for step in range(_PROBE_STEPS):
                tokens = (torch.arange(num_rows) * 977 + step * 31) % model.head.vocabulary_size
                for cumulative in steps.cumulatives(steps.symbols.of(tokens)):
                    digest.update(cumulative.tobytes())
                steps.advance(tokens)
    return digest.digest()[:8]


def compress(source: Path, target: Path, coder: TextModel, progress: Progress) -> None:
    """Code ``source``, any bytes, into ``target``. Raises UserError."""
    try:
        with source.open("rb") as plain, replacing(target) as beside, beside.open("wb") as coded:
            coded.write(bytes(_HEADER.size + _CHECK_BYTES))  # written again when the length is known
            whole, size = source.stat().st_size, 0
            while text := plain.read(SEGMENT_BYTES):
                coded.write(_encode_segment(text, coder, _within(progress, size, whole)))
                size += len(text)
                progress(size, whole)
            head = _HEADER.pack(MAGIC, VERSION, coder.fingerprint, coder.arithmetic, size)
            coded.seek(0)
            coded.write(_sealed(head))
    except OSError as error:
        raise UserError(f"cannot code {source} into {target} ({error.strerror or error})") from error


def decompress(source: Path, target: Path, coder: TextModel, progress: Progress) -> None:
    """The inverse of ``compress``. Raises UserError, DamagedStream for a file that ``compress`` did not write with this
    model, and then leaves no ``target``."""
    try:
        with source.open("rb") as coded, replacing(target) as beside, beside.open("wb") as plain:
            whole, size = _read_header(coded, coder), 0
            while size < whole:
                text = _decode_segment(coded, coder, _within(progress, size, whole))
                plain.write(text)
                size += len(text)
                progress(size, whole)
            if size > whole or coded.read(1):
                raise DamagedStream("its segments do not add up to its length")
    except OSError as error:
        raise UserError(f"cannot decode {source} into {target} ({error.strerror or error})") from error
    except DamagedStream as error:
        raise DamagedStream(f"{source} cannot be decoded: {error}") from None


def _within(progress: Progress, begin: int, whole: int) -> SegmentProgress:
    """The progress of the segment that begins at ``begin`` of the ``whole`` bytes."""
    return lambda done: progress(begin + done, whole)


def _sealed(head: bytes) -> bytes:
    return head + zlib.crc32(head).to_bytes(_CHECK_BYTES, "little")


def _unsealed(coded: BinaryIO, size: int, name: str) -> bytes:
    head = coded.read(size + _CHECK_BYTES)
    if len(head) < size + _CHECK_BYTES:
        raise DamagedStream(f"it was cut short in {name}")
    if _sealed(head[:size]) != head:
        raise DamagedStream(f"{name} fails its checksum")
    return head[:size]


def _read_header(coded: BinaryIO, coder: TextModel) -> int:
    """Bytes of the text."""
    if coded.read(len(MAGIC)) != MAGIC:
        raise DamagedStream("it is no text coded with a model")
    coded.seek(0)
    _, version, fingerprint, arithmetic, size = _HEADER.unpack(_unsealed(coded, _HEADER.size, "its header"))
    if version != VERSION:
        raise DamagedStream(f"it is of version {version}, this program reads version {VERSION}")
    if fingerprint != coder.fingerprint:
        raise DamagedStream("it was coded with another model: name the run that coded it (--model)")
    if arithmetic != coder.arithmetic:
        raise DamagedStream(
            "this machine's processor or torch computes other numbers than the one that coded it: decode it there"
        )
    return int(size)


def _encode_segment(text: bytes, coder: TextModel, progress: SegmentProgress) -> bytes:
    deflated = _deflated(text)
    code, num_tokens = deflated if len(deflated) < len(text) else text, 0
    pieces = range(0, len(text), _PIECE_BYTES)
    tokens = np.concatenate([coder.tokenizer.encode_bytes(text[start : start + _PIECE_BYTES]) for start in pieces])
    try:
        if _text_of(tokens, len(text), coder.tokenizer) == text:  # a tokenizer that lost bytes could not code it
            code = encode_tokens(
                coder.model,
                tokens,
                coder.tokenizer.end_token,
                len(code) - 1,
                lambda done: progress(done * len(text) // len(tokens)),
                coder.num_rows(len(tokens)),
            )
            num_tokens = len(tokens)
    except (TooLongError, DamagedStream):
        pass
    head = _SEGMENT.pack(len(text), num_tokens, len(code), zlib.crc32(text), zlib.crc32(code))
    return _sealed(head) + code


def _decode_segment(coded: BinaryIO, coder: TextModel, progress: SegmentProgress) -> bytes:
    head = _unsealed(coded, _SEGMENT.size, "the head of a segment")
    num_bytes, num_tokens, code_bytes, text_crc32, code_crc32 = _SEGMENT.unpack(head)
    if not num_tokens <= num_bytes <= SEGMENT_BYTES or not 1 <= code_bytes <= num_bytes:
        raise DamagedStream("a segment has impossible lengths")
    code = coded.read(code_bytes)
    if len(code) < code_bytes:
        raise DamagedStream("it was cut short in a segment")
    if zlib.crc32(code) != code_crc32:
        raise DamagedStream("a segment fails its checksum")
    if num_tokens:
        tokens = decode_tokens(
            coder.model,
            code,
            num_tokens,
            coder.tokenizer.end_token,
            lambda done: progress(done * num_bytes // num_tokens),
            coder.num_rows(num_tokens),
        )
        text = _text_of(tokens, num_bytes, coder.tokenizer)
    else:
        text = code if code_bytes == num_bytes else _inflated(code, num_bytes)
    if len(text) != num_bytes or zlib.crc32(text) != text_crc32:
        raise DamagedStream("the decoded text fails its checksum")
    return text


def _text_of(tokens: np.ndarray, most_bytes: int, tokenizer: Tokenizer) -> bytes:
    """Raises DamagedStream for tokens without a text, or of a text of more than ``most_bytes``."""
    parts, size = list[bytes](), 0
    for start in range(0, len(tokens), _PIECE_TOKENS):
        try:
            parts.append(tokenizer.decode_bytes(tokens[start : start + _PIECE_TOKENS]))
        except ValueError as error:
            raise DamagedStream(f"a segment does not decode to text ({error})") from error
        size += len(parts[-1])
        if size > most_bytes:
            raise DamagedStream("the decoded text is longer than it was")
    return b"".join(parts)


def _deflated(text: bytes) -> bytes:
    return zlib.compress(text, 9, wbits=-zlib.MAX_WBITS)


def _inflated(code: bytes, num_bytes: int) -> bytes:
    """The inverse, of at most ``num_bytes``."""
    unpacker = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        text = unpacker.decompress(code, num_bytes)
    except zlib.error as error:
        raise DamagedStream(f"a stored segment cannot be unpacked ({error})") from error
    if not unpacker.eof or unpacker.unused_data:
        raise DamagedStream("a stored segment does not end where it must")
    return text
