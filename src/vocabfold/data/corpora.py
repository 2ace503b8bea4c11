"""From a data configuration (conf/data/*.yaml) to token files: of a text (sources.py), or of a Zipf sequence."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vocabfold.coding.store import StoredTokens
from vocabfold.data.batches import Batches, BatchPlan
from vocabfold.data.content import content_sha256, zipf_identities
from vocabfold.data.shapes import Shapes, load_shapes
from vocabfold.data.sources import sources_of
from vocabfold.data.token_file import STORES, TokenFile, cached_token_file, write_token_file
from vocabfold.data.tokenise import build_token_file
from vocabfold.data.tokenizer import Tokenizer, load_tokenizer
from vocabfold.data.values import count, required
from vocabfold.data.zipf import entropy_rate_nats, zipf_tokens
from vocabfold.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """Both token files and what a model must know of them.

    tokenizer and end_token are None for sequences that are no text; entropy_rate_nats is the least reachable loss in
    nats a token where it is known (zipf), else None. described: the columns of a result row that name the text, of
    which ``train`` may be a part.
    """

    name: str
    train: TokenFile
    valid: TokenFile
    tokenizer: Tokenizer | None
    vocabulary_size: int
    end_token: int | None
    entropy_rate_nats: float | None
    layout: str
    described: dict[str, Any]
    reports_accuracy: bool = False

    @property
    def targets(self) -> np.ndarray | StoredTokens:
        """The training stream."""
        return self.train.tokens

    @functools.cached_property
    def valid_bytes_per_token(self) -> float | None:
        """Bytes of UTF-8 to a token of the validation text, end tokens counted as tokens of no bytes; None where the
        tokens are no text."""
        if self.tokenizer is None or not len(self.valid):
            return None
        tokens, counts = np.unique(self.valid.tokens[:], return_counts=True)
        sizes = [0 if token == self.end_token else len(self.tokenizer.decode_bytes([token])) for token in tokens]
        return int(counts @ np.array(sizes)) / len(self.valid)

    def batches(self, split: str, plan: BatchPlan) -> Batches:
        """Shuffled endless batches of ``train``, or those of ``valid`` in order."""
        tokens, is_training = (self.train, True) if split == "train" else (self.valid, False)
        return Batches(tokens, **vars(plan), layout=self.layout, end_token=self.end_token, shuffle=is_training)

    def with_development(self, share: float) -> Corpus:
        """The same corpus with its last training documents, ``share`` of the tokens, in the place of the validation
        set: what is chosen on them has not seen that set. 0 changes nothing. Raises UserError where a part would be
        empty."""
        if share == 0:
            return self
        train, development = self.train.split(share)
        return replace(self, train=train, valid=development)

    def with_training_tokens(self, num_tokens: int | None) -> Corpus:
        """The same corpus with only the first ``num_tokens`` of its training text: neither a step of training nor a
        count sees more. None changes nothing. Raises UserError for more than there are."""
        return self if num_tokens is None else replace(self, train=self.train.first(num_tokens))


def load_data(data: Mapping[str, Any]) -> Corpus | Shapes:
    """What a resolved conf/data/*.yaml node names, tokens or pictures. Raises UserError as ``load_corpus`` does."""
    return load_shapes(data) if data.get("name") == "shapes" else load_corpus(data)


def load_corpus(data: Mapping[str, Any]) -> Corpus:
    """The corpus of a resolved conf/data/*.yaml node; text is tokenised on first use into ``data.cache_dir``.

    Raises UserError, in one line that says what to do, for a missing setting, file or data set, and for pictures.
    """
    name = required(data, "name")
    if name == "shapes":
        raise UserError("data.name=shapes is a set of pictures: choose a corpus of text with data=NAME")
    if name == "zipf":
        return _zipf_corpus(data)
    # both are looked at before either is tokenised: a missing validation file must not cost an hour first
    described = sources_of(data)
    tokenizer = load_tokenizer(required(data, "tokenizer"))
    workers = _workers(data)
    _warn_of_shared_files(*(identity.get("files", ()) for identity, _ in described.values()))
    files = {}
    for split, (identity, documents) in described.items():

        def build(
            folder: Path, key: dict[str, Any], split: str = split, documents: Callable[[], Iterable[str]] = documents
        ) -> TokenFile:
            return build_token_file(folder, documents(), tokenizer, workers, f"tokenising {name} {split}", key)

        key = {"source": identity, "tokenizer": tokenizer.name} | _store(data)
        files[split] = cached_token_file(Path(required(data, "cache_dir")), f"{name}-{split}", key, build)
    return Corpus(
        name=data.get("label") or name,
        train=files["train"],
        valid=files["valid"],
        tokenizer=tokenizer,
        vocabulary_size=tokenizer.vocabulary_size,
        end_token=tokenizer.end_token,
        entropy_rate_nats=None,
        layout=required(data, "layout"),
        described=_text_columns(data, files["train"]),
    )


def load_for_generation(data: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer alone, without touching the corpus; None where there is no text (zipf, shapes)."""
    return None if required(data, "name") in ("zipf", "shapes") else load_tokenizer(required(data, "tokenizer"))


def _warn_of_shared_files(train: Sequence[Mapping[str, Any]], valid: Sequence[Mapping[str, Any]]) -> None:
    """Say in one line on stderr where both splits read the same file, or files of the same content."""
    if {file["sha256"] for file in train} & {file["sha256"] for file in valid}:
        print(
            "vocabfold: data.train and data.valid hold the same file: the validation loss is one of text trained on",
            file=sys.stderr,
        )


def _text_columns(data: Mapping[str, Any], train: TokenFile) -> dict[str, Any]:
    """The columns of a result row that name a text."""
    return {
        "corpus": data.get("label") or data["name"],
        "corpus_sha256": content_sha256(data)["train"],
        "corpus_documents": train.num_documents,
        "corpus_tokens": len(train),
    }


def _store(data: Mapping[str, Any]) -> dict[str, str]:
    """How the tokens lie in the cache, where that is not as they are: a part of the cache's key."""
    store = data.get("store") or "raw"
    if store not in STORES:
        raise UserError(f"data.store is {store!r}: choose one of {', '.join(STORES)}")
    return {} if store == "raw" else {"store": store}


def _workers(data: Mapping[str, Any]) -> int:
    if data.get("workers") is not None:
        return count(data, "workers")
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _zipf_corpus(data: Mapping[str, Any]) -> Corpus:
    law, identities = zipf_identities(data)
    files = {}
    for split, identity in identities.items():
        num_tokens = identity["num_tokens"]

        def build(folder: Path, key: dict[str, Any], split: str = split, num_tokens: int = num_tokens) -> TokenFile:
            # the whole sequence is one document: its length comes with the last chunk
            def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
                for tokens in zipf_tokens(law, num_tokens, split):
                    yield tokens, np.empty(0, np.int64)
                yield np.empty(0, np.int64), np.array([num_tokens])

            return write_token_file(folder, chunks(), law.vocabulary_size, key)

        key = identity | _store(data)
        files[split] = cached_token_file(Path(required(data, "cache_dir")), f"zipf-{split}", key, build)
    return Corpus(
        name="zipf",
        train=files["train"],
        valid=files["valid"],
        tokenizer=None,
        vocabulary_size=law.vocabulary_size,
        end_token=None,
        entropy_rate_nats=entropy_rate_nats(law),
        layout=required(data, "layout"),
        described=_text_columns(data, files["train"]),
    )
