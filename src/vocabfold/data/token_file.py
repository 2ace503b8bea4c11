"""Token streams in memory-mapped files that are whole and checked, or built again.

A token file is a folder: tokens.bin (uint16 where V <= 65,536, else uint32; little endian), document_starts.bin
(uint64) and meta.json (what it was made from, counts, checksums). Where its key names a store other than raw, the
tokens lie coded in tokens.vftc instead (vocabfold/coding/container.py). The folder is written beside its place and
renamed as the last act.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.tokens import token_dtype

# part of every cache key: raise it when the same documents would give other files
TOKEN_FILE_VERSION = 1
TOKENS_NAME, CODED_NAME, STARTS_NAME = "tokens.bin", "tokens.vftc", "document_starts.bin"
# of the coders in vocabfold.coding the ones that give back any part of a stream fast
STORES = ("raw", "bitpack", "huffman", "rans", "zstd")
_CHECKSUM_BLOCK_BYTES = 1 << 24

if TYPE_CHECKING:
    from vocabfold.coding.store import StoredTokens

Chunk = tuple[np.ndarray, np.ndarray]


class DamagedTokenFile(UserError):
    """A token file whose content is not what was written."""


@dataclass(frozen=True)
class TokenFile:
    """A stream of tokens on disk.

    tokens: [len(self)] uint16 or uint32, a memory map or, where they lie coded, what reads like one;
    document_starts: [num_documents + 1] uint64 memory map, the offset of each document's first token and, last, the
    number of tokens. A document includes the end token that follows it.
    """

    tokens: np.ndarray | StoredTokens
    document_starts: np.ndarray
    vocabulary_size: int
    folder: Path

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1

    def first(self, num_tokens: int) -> TokenFile:
        """The stream up to its token ``num_tokens``, which ends the last document wherever it is. Raises UserError for
        fewer than 1 token and more than there are."""
        if not 0 < num_tokens <= len(self):
            raise UserError(f"{num_tokens} tokens of {len(self)}: choose at least 1 and no more than there are")
        starts = np.asarray(self.document_starts).astype(np.int64)
        starts = np.append(starts[starts < num_tokens], num_tokens)
        return replace(self, tokens=self.tokens[:num_tokens], document_starts=starts)

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
            (beside / TOKENS_NAME).open("wb") as tokens_out,
            (beside / STARTS_NAME).open("wb") as starts_out,
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
        if (store := key.get("store", "raw")) != "raw":
            meta |= _code(beside, dtype, vocabulary_size, store)
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
        if key is not None and meta["key"] != key:
            raise ValueError("it was made from something else")
        dtype, count = token_dtype(meta["vocabulary_size"]), meta["num_tokens"]
        coded_bytes = meta.get("coded_bytes")
        tokens_path = folder / (TOKENS_NAME if coded_bytes is None else CODED_NAME)
        num_starts = meta["num_documents"] + 1
        _check_file(tokens_path, coded_bytes or count * dtype.itemsize, meta["tokens_crc32"])
        _check_file(folder / STARTS_NAME, num_starts * 8, meta["document_starts_crc32"])
        starts = np.memmap(folder / STARTS_NAME, "<u8", "r", shape=(num_starts,))
        tokens: np.ndarray | StoredTokens
        if coded_bytes is None:
            tokens = np.memmap(tokens_path, dtype, "r", shape=(count,))
        else:
            from vocabfold.coding.store import StoredTokens  # torch, which the tokenising processes need not load

            tokens = StoredTokens(tokens_path, meta["vocabulary_size"])
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise DamagedTokenFile(f"the token file {folder} is damaged ({error})") from error
    return TokenFile(tokens, starts, meta["vocabulary_size"], folder)


def _check_file(path: Path, size_bytes: int, checksum: int) -> None:
    """Raise ValueError unless the file has this size and CRC-32."""
    if path.stat().st_size != size_bytes:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {size_bytes}")
    if _crc32(path) != checksum:
        raise ValueError(f"{path.name} fails its checksum")


def _code(folder: Path, dtype: np.dtype, vocabulary_size: int, store: str) -> dict[str, int]:
    """Replace the raw tokens in ``folder`` by coded ones; their size and CRC-32, as meta.json has them."""
    from vocabfold.coding.container import encode  # torch, which the tokenising processes need not load

    raw = folder / TOKENS_NAME
    coded = encode(np.memmap(raw, dtype, "r"), vocabulary_size, store)
    with (folder / CODED_NAME).open("wb") as out:
        out.write(coded)
        out.flush()
        os.fsync(out.fileno())
    raw.unlink()
    return {"coded_bytes": len(coded), "tokens_crc32": zlib.crc32(coded)}


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
        except OSError as error:  # by its errno: whether one is there, another process may have changed meanwhile
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
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
