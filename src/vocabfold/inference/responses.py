"""Whole answers on disk: the same request to the same weights is answered without computing anything.

One small file an answer: a mark, the SHA-256 of key and content, then the tokens as 2 or 4 bytes each, deflated where
that is shorter. The key is the SHA-256 of the whole request, so that nothing is served for another setting.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vocabfold.errors import UserError
from vocabfold.files import replacing
from vocabfold.models.build import ModelWithHead

MARK = b"vfr1"
DIGEST_BYTES = hashlib.sha256().digest_size
WIDTHS = {b"2": "<u2", b"4": "<u4"}  # bytes of a token, as the content's first byte tells them
PLAIN, DEFLATED = b"p", b"d"
MOST_TOKENS = 1 << 20  # of an answer: a small file that was made up could unpack to a thousand times its bytes
SUFFIX = ".answer"


class ResponseCache:
    """Answers in ``folder``, at most ``limit_bytes`` of them in all; the least recently used go first.

    A damaged file is deleted, with a line on stderr, and counts as absent. Raises UserError for a negative limit or a
    folder that cannot be written.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise UserError(f"the response cache is limited to {limit_bytes} bytes: choose 0 (keeps nothing) or more")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the response cache cannot use {folder} ({error.strerror}): name another folder"
            ) from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"the response cache cannot write to {folder}: name another folder")
        self.folder = folder
        self.limit_bytes = limit_bytes

    def answer(self, request: Mapping[str, Any], generate: Callable[[], Iterator[int]]) -> Iterator[int]:
        """The tokens stored for ``request``, or those of ``generate``, which are stored once all have been taken."""
        stored = self.get(request)
        if stored is not None:
            yield from stored
            return
        tokens = []
        for token in generate():
            tokens.append(token)
            yield token
        self.put(request, tokens)

    def get(self, request: Mapping[str, Any]) -> list[int] | None:
        """The tokens stored for ``request``, None where there are none."""
        path = self._path(request)
        try:
            content = path.read_bytes()
            os.utime(path)  # used now
        except OSError:
            return None
        tokens = unpack(path.stem, content)
        if tokens is None:
            print(f"response cache: {path.name} is damaged and was dropped", file=sys.stderr)
            path.unlink(missing_ok=True)
        return tokens

    def put(self, request: Mapping[str, Any], tokens: Sequence[int]) -> None:
        """Store ``tokens`` for ``request`` as a whole or not at all; one of more bytes than the limit, or of more than
        MOST_TOKENS, is not stored."""
        path = self._path(request)
        content = pack(path.stem, tokens)
        if len(content) > self.limit_bytes or len(tokens) > MOST_TOKENS:
            return
        try:
            with replacing(path) as beside:
                beside.write_bytes(content)
        except OSError as error:
            raise UserError(f"the response cache cannot write to {self.folder} ({error.strerror})") from error
        files = sorted(self._files())
        excess = sum(size for _, size, _ in files) - self.limit_bytes
        for _, size, oldest in files:
            if excess <= 0:
                break
            oldest.unlink(missing_ok=True)
            excess -= size

    @property
    def stored_bytes(self) -> int:
        """Bytes of all answers."""
        return sum(size for _, size, _ in self._files())

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(when it was last used, its bytes, its path) of every answer."""
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(FileNotFoundError):  # another process may have dropped it meanwhile
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path

    def _path(self, request: Mapping[str, Any]) -> Path:
        words = json.dumps(request, sort_keys=True)
        return self.folder / f"{hashlib.sha256(words.encode()).hexdigest()}{SUFFIX}"


def pack(key: str, tokens: Sequence[int]) -> bytes:
    """The content of an answer's file."""
    width = b"2" if max(tokens, default=0) < 1 << 16 else b"4"
    plain = np.asarray(tokens, dtype=WIDTHS[width]).tobytes()
    deflated = zlib.compress(plain, level=9, wbits=-zlib.MAX_WBITS)
    body = width + (DEFLATED + deflated if len(deflated) < len(plain) else PLAIN + plain)
    return MARK + hashlib.sha256(key.encode() + body).digest() + body


def unpack(key: str, content: bytes) -> list[int] | None:
    """The tokens of an answer's file, None where it is damaged or another request's."""
    head = len(MARK) + DIGEST_BYTES
    digest, body = content[len(MARK) : head], content[head:]
    if not content.startswith(MARK) or hashlib.sha256(key.encode() + body).digest() != digest:
        return None
    width, form, plain = body[:1], body[1:2], body[2:]
    if width not in WIDTHS or form not in (PLAIN, DEFLATED):
        return None
    dtype = np.dtype(WIDTHS[width])
    if form == DEFLATED:
        unpacker = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
        try:
            plain = unpacker.decompress(plain, MOST_TOKENS * dtype.itemsize)
        except zlib.error:
            return None
        if not unpacker.eof:
            return None
    return np.frombuffer(plain, dtype).tolist() if len(plain) % dtype.itemsize == 0 else None


def fingerprint(model: ModelWithHead) -> str:
    """SHA-256 of all that decides what a model answers: its modules, sizes and weights."""
    digest = hashlib.sha256(repr(model.gpt.config).encode())
    for name, module in model.named_modules():
        digest.update(f"{name}: {type(module).__qualname__};".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}: {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
