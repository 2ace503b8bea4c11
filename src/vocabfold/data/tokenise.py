"""Documents to a token file: tokenised once, in order, by several processes where there is much text."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vocabfold.data.token_file import Chunk, TokenFile, write_token_file
from vocabfold.data.tokenizer import Tokenizer, load_tokenizer
from vocabfold.data.workers import worker_processes
from vocabfold.errors import UserError
from vocabfold.tokens import token_dtype

CHARACTERS_PER_CHUNK = 1_000_000
# starting worker processes costs seconds, as long as this much text takes in this process
CHARACTERS_WITHOUT_WORKERS = 50_000_000


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
    # closed at once where writing fails, so that the bar is gone before the error is told
    with contextlib.closing(_encoded_chunks(documents, tokenizer, workers, description)) as chunks:
        return write_token_file(folder, chunks, tokenizer.vocabulary_size, key)


def _encoded_chunks(
    documents: Iterable[str], tokenizer: Tokenizer, workers: int, description: str
) -> Generator[Chunk, None, None]:
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
    with worker_processes(workers) as pool:
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
