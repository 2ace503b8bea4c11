"""Tokenizers of transformers as ours are: bytes to tokens and back without loss."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from vocabfold.errors import UserError

END_OF_TEXT = "<|endoftext|>"
USUAL_BYTES = (*b"\n", *range(32, 127))
_OTHER_BYTES = re.compile("([\udc80-\udcff]+)")


class ByteTokens:
    """A fast byte-level tokenizer, with what ``vocabfold.data.tokenizer.Tokenizer`` offers to coders.

    ``vocabulary_size``: the rows of its model, which may be more than its tokens. Special tokens that are written out
    in a text are themselves. ``end_token`` begins a text: <|endoftext|> where there is one. Raises UserError for
    tokenizers of another kind, which lose bytes.
    """

    def __init__(self, tokenizer: Any, vocabulary_size: int) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode  # not above: it may be missing

        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise UserError(f"{type(tokenizer).__name__} is no fast tokenizer: only these give every byte back")
        self.vocabulary_size = vocabulary_size
        self.name = hashlib.sha256(self._backend.to_str().encode()).hexdigest()[:16]
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        self._bytes_of: dict[int, bytes] = {number: content.encode() for number, content in added.items()}
        for token, number in self._backend.get_vocab(with_added_tokens=False).items():
            if number not in added and all(character in byte_of for character in token):
                self._bytes_of[number] = bytes(byte_of[character] for character in token)
        token_of = {content: number for number, content in self._bytes_of.items() if number not in added}
        missing = [byte for byte in USUAL_BYTES if bytes([byte]) not in token_of]
        if missing or max(self._bytes_of) >= vocabulary_size:
            what = f"has no token of the byte {missing[0]}" if missing else "has more tokens than the model has rows"
            raise UserError(f"{type(tokenizer).__name__} {what}: only byte-level tokenizers give every byte back")
        ends = [self._backend.token_to_id(END_OF_TEXT), tokenizer.bos_token_id, tokenizer.eos_token_id]
        self.end_token: int = next((end for end in ends if end is not None), 0)
        # Vocabularies leave out bytes that their texts did not have. A text with one does not come back from its
        # tokens, which coders notice.
        self._token_of_byte = [token_of.get(bytes([byte]), self.end_token) for byte in range(256)]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, nothing added."""
        backend: Any = self._backend
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Token ids, uint32: of UTF-8 as text, of every other byte as the token of itself, if there is one."""
        ids: list[int] = []
        # bytes that are no UTF-8 read as lone surrogates U+DC80 .. U+DCFF, which UTF-8 cannot hold
        for text in _OTHER_BYTES.split(data.decode("utf-8", errors="surrogateescape")):
            if _OTHER_BYTES.match(text):
                ids += [self._token_of_byte[byte] for byte in text.encode("utf-8", errors="surrogateescape")]
            elif text:
                ids += self.encode(text)
        return np.array(ids, np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The inverse of ``encode_bytes``. Raises ValueError for an id that no text has."""
        try:
            return b"".join([self._bytes_of[int(token)] for token in ids])
        except KeyError as error:
            raise ValueError(f"token id {error} has no text") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 read U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")
