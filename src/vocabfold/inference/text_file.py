"""Files coded with a trained model, segment by segment, so that neither side holds more than a segment.

    magic VFTM, version, 3 unused bytes | fingerprint of the model (16) | fingerprint of the machine's arithmetic (8) |
    bytes of the text (8) | CRC-32 of all so far (4)
    then for each MiB of text: its bytes, its tokens, bytes of its code, CRC-32 of the text, CRC-32 of the code, CRC-32
    of these five numbers (4 bytes each), and the code

All little endian. A decoder takes memory for one segment, of at most a MiB of text.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from vocabfold.coding.damage import DamagedStream
from vocabfold.data.corpora import load_for_generation
from vocabfold.data.tokenizer import Tokenizer
from vocabfold.errors import UserError
from vocabfold.files import replacing
from vocabfold.generate import load_run
from vocabfold.inference.model_coder import ModelSteps, decode_tokens, encode_tokens, one_thread
from vocabfold.models.build import ModelWithHead
from vocabfold.runs.settings import load_settings

MAGIC = b"VFTM"
VERSION = 1
SEGMENT_BYTES = 1 << 20
_HEADER = struct.Struct("<4sB3x16s8sQ")
_SEGMENT = struct.Struct("<5I")
_CHECK_BYTES = 4
_PROBE_STEPS = 4


@dataclass(frozen=True)
class TextModel:
    """A trained model that codes text. ``fingerprint``: of its weights and settings; ``arithmetic``: of the numbers
    that it computes on this machine."""

    model: ModelWithHead
    tokenizer: Tokenizer
    fingerprint: bytes
    arithmetic: bytes


def load_text_model(folder: Path) -> TextModel:
    """The model of a finished run, on the CPU. Raises UserError for a folder that is not one, or is not of text."""
    settings = load_settings(folder)
    tokenizer = load_for_generation(settings.data)
    if tokenizer is None:
        raise UserError(f"{folder} was trained on token sequences without a text form: it cannot code text")
    model = load_run(folder, torch.device("cpu"))
    described = {"model": asdict(settings.model), "head": asdict(settings.head), "tokenizer": tokenizer.name}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return TextModel(model, tokenizer, digest.digest()[:16], _arithmetic(model, tokenizer.end_token))


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


def compress(source: Path, target: Path, coder: TextModel, progress: Callable[[int], object]) -> None:
    """Code ``source``, any bytes, into ``target``; ``progress`` is told of bytes done. Raises UserError."""
    try:
        with source.open("rb") as plain, replacing(target) as beside, beside.open("wb") as coded:
            coded.write(bytes(_HEADER.size + _CHECK_BYTES))  # written again when the length is known
            size = 0
            while text := plain.read(SEGMENT_BYTES):
                coded.write(_encode_segment(text, coder))
                size += len(text)
                progress(len(text))
            head = _HEADER.pack(MAGIC, VERSION, coder.fingerprint, coder.arithmetic, size)
            coded.seek(0)
            coded.write(_sealed(head))
    except OSError as error:
        raise UserError(f"cannot code {source} into {target} ({error.strerror or error})") from error


def decompress(source: Path, target: Path, coder: TextModel, progress: Callable[[int], object]) -> None:
    """The inverse of ``compress``. Raises DamagedStream, and then leaves no ``target``."""
    try:
        with source.open("rb") as coded, replacing(target) as beside, beside.open("wb") as plain:
            left = _read_header(coded, coder)
            while left > 0:
                text = _decode_segment(coded, coder)
                plain.write(text)
                left -= len(text)
                progress(len(text))
            if left or coded.read(1):
                raise DamagedStream("its segments do not add up to its length")
    except OSError as error:
        raise UserError(f"cannot decode {source} into {target} ({error.strerror or error})") from error
    except DamagedStream as error:
        raise DamagedStream(f"{source} cannot be decoded: {error}") from error


def text_bytes(source: Path) -> int:
    """Bytes of the text in a coded file, from its header. Raises UserError."""
    try:
        with source.open("rb") as coded:
            return int(_opened(coded)[2])
    except OSError as error:
        raise UserError(f"cannot read {source} ({error.strerror})") from error
    except DamagedStream as error:
        raise DamagedStream(f"{source} cannot be decoded: {error}") from error


def _sealed(head: bytes) -> bytes:
    return head + zlib.crc32(head).to_bytes(_CHECK_BYTES, "little")


def _unsealed(coded: BinaryIO, size: int, name: str) -> bytes:
    head = coded.read(size + _CHECK_BYTES)
    if len(head) < size + _CHECK_BYTES:
        raise DamagedStream(f"it was cut short in {name}")
    if _sealed(head[:size]) != head:
        raise DamagedStream(f"{name} fails its checksum")
    return head[:size]


def _opened(coded: BinaryIO) -> tuple[bytes, bytes, int]:
    """(fingerprint, arithmetic, bytes of the text)."""
    if os.fstat(coded.fileno()).st_size < len(MAGIC) or coded.read(len(MAGIC)) != MAGIC:
        raise DamagedStream("it is no text coded with a model")
    coded.seek(0)
    _, version, fingerprint, arithmetic, size = _HEADER.unpack(_unsealed(coded, _HEADER.size, "its header"))
    if version != VERSION:
        raise DamagedStream(f"it is of version {version}, this program reads version {VERSION}")
    return fingerprint, arithmetic, size


def _read_header(coded: BinaryIO, coder: TextModel) -> int:
    fingerprint, arithmetic, size = _opened(coded)
    if fingerprint != coder.fingerprint:
        raise DamagedStream("it was coded with another model: name the run that coded it (--model)")
    if arithmetic != coder.arithmetic:
        raise DamagedStream(
            "this machine's processor or torch computes other numbers than the one that coded it: decode it there"
        )
    return size


def _encode_segment(text: bytes, coder: TextModel) -> bytes:
    tokens = coder.tokenizer.encode_bytes(text)
    if coder.tokenizer.decode_bytes(tokens) != text:
        raise UserError(f"the tokenizer {coder.tokenizer.name} loses bytes of this text: it cannot be coded with it")
    code = encode_tokens(coder.model, tokens, coder.tokenizer.end_token)
    head = _SEGMENT.pack(len(text), len(tokens), len(code), zlib.crc32(text), zlib.crc32(code))
    return _sealed(head) + code


def _decode_segment(coded: BinaryIO, coder: TextModel) -> bytes:
    head = _unsealed(coded, _SEGMENT.size, "the head of a segment")
    num_bytes, num_tokens, code_bytes, text_crc32, code_crc32 = _SEGMENT.unpack(head)
    # a token is at least a byte, and at most two symbols of BITS bits
    if not 1 <= num_tokens <= num_bytes <= SEGMENT_BYTES or code_bytes > 8 * num_tokens + 1024:
        raise DamagedStream("a segment has impossible lengths")
    code = coded.read(code_bytes)
    if len(code) < code_bytes:
        raise DamagedStream("it was cut short in a segment")
    if zlib.crc32(code) != code_crc32:
        raise DamagedStream("a segment fails its checksum")
    tokens = decode_tokens(coder.model, code, num_tokens, coder.tokenizer.end_token)
    try:
        text = coder.tokenizer.decode_bytes(tokens)
    except ValueError as error:
        raise DamagedStream(f"a segment does not decode to text ({error})") from error
    if len(text) != num_bytes or zlib.crc32(text) != text_crc32:
        raise DamagedStream("the decoded text fails its checksum")
    return text
