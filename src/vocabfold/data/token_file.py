"""Documents tokenised once, in parallel, into memory-mapped files that are whole and checked, or built again.

A token file is a folder: tokens.bin (uint16 where V <= 65,536, else uint32; little endian), document_starts.bin
(uint64) and meta.json (what it was made from, counts, checksums). The folder is written beside its place and renamed
as the last act.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from vocabfold.data.tokenizer import Tokenizer, load_tokenizer
from vocabfold.errors import UserError
from vocabfold.files import write_text

# part of every cache key: raise it when the same documents would give other files
TOKEN_FILE_VERSION = 1
CHARACTERS_PER_CHUNK = 1_000_000
# starting worker processes costs seconds, as long as this much text takes in this process
CHARACTERS_WITHOUT_WORKERS = 50_000_000
_CHECKSUM_BLOCK_BYTES = 1 << 24

Chunk = tuple[np.ndarray, np.ndarray]


class DamagedTokenFile(UserError):
    """A token file whose content is not what was written."""


@dataclass(frozen=True)
class TokenFile:
    """A stream of tokens on disk.

    tokens: [len(self)] uint16 or uint32 memory map; document_starts: [num_documents + 1] uint64 memory map, the
    offset of each document's first token and, last, the number of tokens. A document includes the end token that
    follows it.
    """

    tokens: np.ndarray
    document_starts: np.ndarray
    vocabulary_size: int
    folder: Path

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1

    def split(self, share: float) -> tuple[TokenFile, TokenFile]:
        """(the documents before, the last documents, which hold at least ``share`` of the tokens).

        A stream of one document is cut within it. Raises UserError where either part would be empty.
        """
        cut = len(self) - math.ceil(share * len(self))
        starts = np.asarray(self.document_starts).astype(np.int64)
        if self.num_documents > 1:
            cut = int(starts[np.searchsorted(starts, cut, side="right") - 1])
        if not 0 < cut < len(self):
            raise UserError(
                f"a share of {share} of {self.num_documents} documents leaves nothing on one side: choose another share"
            )
        before = np.append(starts[starts < cut], cut)
        after = np.concatenate([[0], starts[starts > cut] - cut])
        return (
            replace(self, tokens=self.tokens[:cut], document_starts=before),
            replace(self, tokens=self.tokens[cut:], document_starts=after),
        )


def token_dtype(vocabulary_size: int) -> np.dtype:
    """The narrowest dtype of a token file that holds every id below V."""
    return np.dtype("<u2" if vocabulary_size <= 1 << 16 else "<u4")


def cached_token_file(
    cache_dir: Path, label: str, key: Mapping[str, Any], build: Callable[[Path, dict[str, Any]], TokenFile]
) -> TokenFile:
    """The token file of ``key`` under ``cache_dir/<label>-<first 12 digits of the key's sha256>``, built if it is not
    there.

    key: all that decides the content, as JSON values; this module's version is added. ``build(folder, key)`` makes it.
    One process builds while others wait for its lock. A damaged file is told on stderr in one line and built again.
    Raises UserError if the cache folder cannot be written.
    """
    full_key: dict[str, Any] = json.loads(json.dumps({**key, "token_file_version": TOKEN_FILE_VERSION}))
    digest = hashlib.sha256(json.dumps(full_key, sort_keys=True).encode()).hexdigest()
    cache_dir = cache_dir.expanduser()
    folder = cache_dir / f"{label}-{digest[:12]}"
    try:
        # Before the lock: a finished cache may lie in a folder that cannot be written.
        return open_token_file(folder, full_key)
    except (FileNotFoundError, DamagedTokenFile):
        pass
    lock = FileLock(cache_dir / f".{folder.name}.lock")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise UserError(f"cannot write to the cache folder {cache_dir} ({error}); set data.cache_dir=FOLDER") from error
    try:
        try:
            return open_token_file(folder, full_key)
        except FileNotFoundError:
            pass
        except DamagedTokenFile as damage:
            print(f"vocabfold: {damage}; building it again", file=sys.stderr)
        for leftover in cache_dir.glob(f".{folder.name}.*.part"):  # of a build that was killed: the lock is ours
            shutil.rmtree(leftover, ignore_errors=True)
        return build(folder, full_key)
    finally:
        lock.release()


def build_token_file(
    folder: Path,
    documents: Iterable[str],
    tokenizer: Tokenizer,
    workers: int,
    description: str,
    key: Mapping[str, Any],
) -> TokenFile:
    """Tokenise documents in order, each followed by the end token, into a token file at ``folder``.

    A few chunks of about a million characters are in memory at a time. With ``workers`` > 1 and enough text, that many
    processes tokenise. ``description`` labels the progress bar. Raises UserError if there is no document.
    """
    chunks = _encoded_chunks(documents, tokenizer, workers, description)
    return write_token_file(folder, chunks, tokenizer.vocabulary_size, key)


def write_token_file(folder: Path, chunks: Iterable[Chunk], vocabulary_size: int, key: Mapping[str, Any]) -> TokenFile:
    """Write chunks, pairs of token ids [n] and document lengths [m], as a token file at ``folder``.

    A document may span chunks (its length comes with any of them), so only the sums over all chunks must agree.
    Raises UserError if there are no tokens or the disk is full, ValueError for an id >= V or lengths that do not
    add up.
    """
    dtype = token_dtype(vocabulary_size)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        num_tokens = num_documents = documents_end = tokens_crc32 = 0
        first_start = bytes(8)
        starts_crc32 = zlib.crc32(first_start)
        with (
            (beside / "tokens.bin").open("wb") as tokens_out,
            (beside / "document_starts.bin").open("wb") as starts_out,
        ):
            starts_out.write(first_start)
            for tokens, lengths in chunks:
                if tokens.size and int(tokens.max()) >= vocabulary_size:
                    raise ValueError(f"token id {int(tokens.max())} does not fit a vocabulary of {vocabulary_size}")
                token_bytes = tokens.astype(dtype).tobytes()
                start_bytes = (documents_end + np.cumsum(lengths)).astype("<u8").tobytes()
                tokens_out.write(token_bytes)
                starts_out.write(start_bytes)
                tokens_crc32 = zlib.crc32(token_bytes, tokens_crc32)
                starts_crc32 = zlib.crc32(start_bytes, starts_crc32)
                num_tokens += len(tokens)
                num_documents += len(lengths)
                documents_end += int(lengths.sum())
            for out in (tokens_out, starts_out):
                out.flush()
                os.fsync(out.fileno())
        if num_tokens == 0:
            raise UserError("there is no text to tokenise: every document is empty")
        if documents_end != num_tokens:
            raise ValueError(f"document lengths sum to {documents_end}, but there are {num_tokens} tokens")
        meta = {
            "dtype": dtype.name,
            "vocabulary_size": vocabulary_size,
            "num_tokens": num_tokens,
            "num_documents": num_documents,
            "tokens_crc32": tokens_crc32,
            "document_starts_crc32": starts_crc32,
            "key": dict(key),
        }
        write_text(beside / "meta.json", json.dumps(meta, indent=1))
        built = open_token_file(beside)  # what is read back is what was meant, or it does not take its place
        _move_folder(beside, folder)
        return replace(built, folder=folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"no space for the token file {folder}; free some or set data.cache_dir=FOLDER") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def open_token_file(folder: Path, key: Mapping[str, Any] | None = None) -> TokenFile:
    """Open a token file after reading it whole once against its sizes and CRC-32 (about a second for each GB).

    Raises FileNotFoundError where there is none, DamagedTokenFile where sizes, checksums or ``key`` (if given) do not
    agree.
    """
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        dtype = token_dtype(meta["vocabulary_size"])
        expected = {
            "tokens.bin": (dtype, meta["num_tokens"], meta["tokens_crc32"]),
            "document_starts.bin": (np.dtype("<u8"), meta["num_documents"] + 1, meta["document_starts_crc32"]),
        }
        if key is not None and meta["key"] != key:
            raise ValueError("it was made from something else")
        for name, (kind, count, checksum) in expected.items():
            size_bytes = (folder / name).stat().st_size
            if size_bytes != count * kind.itemsize:
                raise ValueError(f"{name} has {size_bytes} bytes instead of {count * kind.itemsize}")
            if _crc32(folder / name) != checksum:
                raise ValueError(f"{name} fails its checksum")
        tokens, starts = (
            np.memmap(folder / name, kind, "r", shape=(count,)) for name, (kind, count, _) in expected.items()
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedTokenFile(f"the token file {folder} is damaged ({error})") from error
    return TokenFile(tokens, starts, meta["vocabulary_size"], folder)


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_CHECKSUM_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _move_folder(source: Path, target: Path) -> None:
    """Put ``source`` in the place of ``target``; of several processes that do so at once any one's folder stays,
    whole.
    """
    while True:
        try:
            source.rename(target)  # over nothing, or over an empty folder
            break
        except OSError:
            if not target.exists():
                raise
            old = target.with_name(f"{source.name}.old.part")
            try:
                target.rename(old)
            except FileNotFoundError:
                continue  # another process has just moved it away
            shutil.rmtree(old)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encoded_chunks(documents: Iterable[str], tokenizer: Tokenizer, workers: int, description: str) -> Iterator[Chunk]:
    with tqdm(desc=description, unit=" documents", unit_scale=True, disable=None) as progress:
        for tokens, lengths in _encoded(_text_chunks(documents), tokenizer.name, workers):
            progress.update(len(lengths))
            yield tokens, lengths


def _text_chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    num_characters = 0
    for document in documents:
        chunk.append(document)
        num_characters += len(document)
        if num_characters >= CHARACTERS_PER_CHUNK:
            yield chunk
            chunk, num_characters = [], 0
    if chunk:
        yield chunk


def _encoded(chunks: Iterator[list[str]], tokenizer_name: str, workers: int) -> Iterator[Chunk]:
    if workers > 1:
        head: list[list[str]] = []
        num_characters = 0
        for chunk in chunks:
            head.append(chunk)
            num_characters += sum(map(len, chunk))
            if num_characters > CHARACTERS_WITHOUT_WORKERS:
                yield from _encoded_by_workers(itertools.chain(head, chunks), tokenizer_name, workers)
                return
        chunks = iter(head)
    for chunk in chunks:
        yield _encode_chunk(tokenizer_name, chunk)


def _encoded_by_workers(chunks: Iterable[list[str]], tokenizer_name: str, workers: int) -> Iterator[Chunk]:
    in_flight: deque[Future[Chunk]] = deque()
    # spawn, not fork: this process may hold threads (torch, tokenizers) that a fork would copy in mid-step
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            for chunk in chunks:
                in_flight.append(pool.submit(_encode_chunk, tokenizer_name, chunk))
                if len(in_flight) > 2 * workers:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("a tokenizer process died, perhaps for lack of memory; try data.workers=1") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _encode_chunk(tokenizer_name: str, documents: list[str]) -> Chunk:
    tokenizer = load_tokenizer(tokenizer_name)
    dtype = token_dtype(tokenizer.vocabulary_size)
    end = np.array([tokenizer.end_token], dtype)
    encoded = [np.concatenate([tokenizer.encode_array(text).astype(dtype), end]) for text in documents]
    return np.concatenate(encoded), np.array([len(tokens) for tokens in encoded], np.int64)
