"""From a data configuration (conf/data/*.yaml) to token files: stories, local text, Hugging Face data sets, Zipf
sequences.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vocabfold.coding.store import StoredTokens
from vocabfold.data.batches import Batches, BatchPlan
from vocabfold.data.shapes import Shapes, load_shapes
from vocabfold.data.token_file import STORES, TokenFile, cached_token_file, write_token_file
from vocabfold.data.tokenise import build_token_file
from vocabfold.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer
from vocabfold.data.zipf import ZipfLaw, entropy_rate_nats, zipf_law, zipf_tokens
from vocabfold.errors import UserError, needed
from vocabfold.files import write_text

Source = tuple[dict[str, Any], Callable[[], Iterable[str]]]
SPLITS = ("train", "valid")
_HASH_BLOCK_BYTES = 1 << 22
_ARTICLE_HEADING = re.compile(r"^ = (?!= ).*(?<! =) = $")


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
    name = _required(data, "name")
    if name == "shapes":
        raise UserError("data.name=shapes is a set of pictures: choose a corpus of text with data=NAME")
    if name == "zipf":
        return _zipf_corpus(data)
    # both are looked at before either is tokenised: a missing validation file must not cost an hour first
    described = _sources(data)
    tokenizer = load_tokenizer(_required(data, "tokenizer"))
    workers = _workers(data)
    _warn_of_shared_files(*(identity.get("files", ()) for identity, _ in described.values()))
    files = {}
    for split, (identity, documents) in described.items():

        def build(
            folder: Path, key: dict[str, Any], split: str = split, documents: Callable[[], Iterable[str]] = documents
        ) -> TokenFile:
            return build_token_file(folder, documents(), tokenizer, workers, f"tokenising {name} {split}", key)

        key = {"source": identity, "tokenizer": tokenizer.name} | _store(data)
        files[split] = cached_token_file(Path(_required(data, "cache_dir")), f"{name}-{split}", key, build)
    return Corpus(
        name=data.get("label") or name,
        train=files["train"],
        valid=files["valid"],
        tokenizer=tokenizer,
        vocabulary_size=tokenizer.vocabulary_size,
        end_token=tokenizer.end_token,
        entropy_rate_nats=None,
        layout=_required(data, "layout"),
        described=_text_columns(data, files["train"]),
    )


def content_sha256(data: Mapping[str, Any]) -> dict[str, str]:
    """{train: .., valid: ..}: the SHA-256 of what a resolved conf/data node holds, wherever it lies.

    Of a local file it is that of its bytes, of several that of theirs, one a line; of documents from elsewhere that of
    the file of text that would hold them; of what is drawn at random that of what decides it. Raises UserError for data
    that cannot be read.
    """
    name = _required(data, "name")
    if name == "shapes":
        return dict.fromkeys(SPLITS, load_shapes(data).sha256)
    if name == "zipf":
        _, identities = _zipf_identities(data)
        return {split: _json_sha256(identity) for split, identity in identities.items()}
    if name == "text":
        return {split: _files_sha256(identity["files"]) for split, (identity, _) in _sources(data).items()}
    return {
        split: _documents_sha256(Path(_required(data, "cache_dir")), identity, documents)
        for split, (identity, documents) in _sources(data).items()
    }


def load_for_generation(data: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer alone, without touching the corpus; None where there is no text (zipf, shapes)."""
    return None if _required(data, "name") in ("zipf", "shapes") else load_tokenizer(_required(data, "tokenizer"))


def _sources(data: Mapping[str, Any]) -> dict[str, Source]:
    """{split: (what its documents are made from, as a key of caches, and the documents)} of a corpus of text."""
    name = _required(data, "name")
    sources: dict[str, Callable[[Mapping[str, Any], str], Source]] = {
        "stories": _stories,
        "text": _text,
        "tinystories": _data_set,
        "wikitext": _data_set,
    }
    if name not in sources:
        raise UserError(f"unknown data.name {name!r}: choose one of {', '.join([*sources, 'zipf', 'shapes'])}")
    return {split: sources[name](data, split) for split in SPLITS}


def _text_columns(data: Mapping[str, Any], train: TokenFile) -> dict[str, Any]:
    """The columns of a result row that name a text."""
    return {
        "corpus": data.get("label") or data["name"],
        "corpus_sha256": content_sha256(data)["train"],
        "corpus_documents": train.num_documents,
        "corpus_tokens": len(train),
    }


def _files_sha256(files: Sequence[Mapping[str, Any]]) -> str:
    sums = [file["sha256"] for file in files]
    return sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest()


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _documents_sha256(cache_dir: Path, identity: dict[str, Any], documents: Callable[[], Iterable[str]]) -> str:
    """The SHA-256 of documents, each with a line <|endoftext|> behind it; kept under ``cache_dir`` by ``identity``."""
    path = cache_dir.expanduser() / f"content-{_json_sha256(identity)[:16]}.sha256"
    with contextlib.suppress(OSError):
        if re.fullmatch("[0-9a-f]{64}", kept := path.read_text(encoding="ascii", errors="replace").strip()):
            return kept
    digest = hashlib.sha256()
    for document in documents():
        digest.update(f"{document}\n{END_OF_TEXT}\n".encode())
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, no result
        write_text(path, digest.hexdigest() + "\n")
    return digest.hexdigest()


def _required(data: Mapping[str, Any], key: str) -> Any:
    value = data.get(key)
    if value is None:
        raise UserError(f"data.{key} is not set; choose a corpus with data=NAME or set data.{key}=VALUE")
    return value


def _count(data: Mapping[str, Any], key: str) -> int:
    value = _whole(data, key)
    if value < 1:
        raise UserError(f"data.{key} must be 1 or more, not {value}")
    return value


def _whole(data: Mapping[str, Any], key: str) -> int:
    value = _required(data, key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"data.{key} must be a whole number, not {value!r}")
    return value


def _number(data: Mapping[str, Any], key: str) -> float:
    value = _required(data, key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"data.{key} must be a number, not {value!r}")
    return value


def _store(data: Mapping[str, Any]) -> dict[str, str]:
    """How the tokens lie in the cache, where that is not as they are: a part of the cache's key."""
    store = data.get("store") or "raw"
    if store not in STORES:
        raise UserError(f"data.store is {store!r}: choose one of {', '.join(STORES)}")
    return {} if store == "raw" else {"store": store}


def _workers(data: Mapping[str, Any]) -> int:
    if data.get("workers") is not None:
        return _count(data, "workers")
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stories(data: Mapping[str, Any], split: str) -> Source:
    from vocabfold.data import stories

    num_train, num_valid = _count(data, "num_train_documents"), _count(data, "num_valid_documents")
    start, stop = (0, num_train) if split == "train" else (num_train, num_train + num_valid)
    seed = _whole(data, "seed")
    code = hashlib.sha256()  # another generator tells other stories under the same seed
    for path in sorted(Path(stories.__file__).parent.glob("stor*.py")):
        code.update(path.read_bytes())
    identity = {"kind": "stories", "code_sha256": code.hexdigest(), "seed": seed, "start": start, "stop": stop}
    return identity, lambda: stories.stories(seed, start, stop)


def _text(data: Mapping[str, Any], split: str) -> Source:
    for key in SPLITS:
        if not data.get(key):
            raise UserError(f"data=text needs data.train=FILE and data.valid=FILE; data.{key} is missing")
    paths = _local_files(data[split], f"data.{split}")

    def documents() -> Iterator[str]:
        empty = True
        for path in paths:
            for document in _documents_of_file(path):
                empty = False
                yield document
        if empty:
            raise UserError(f"data.{split}={data[split]} holds no text; give a file with text in it")

    return {"kind": "text", "files": _content_identity(paths)}, documents


def _local_files(wanted: str | Sequence[str], key: str) -> list[Path]:
    """Existing files for a path, a glob or a list of them, in the order given, a glob's in the order of names."""
    paths: list[Path] = []
    patterns = [wanted] if isinstance(wanted, str | Path) else wanted
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str | Path) for pattern in patterns):
        raise UserError(f"{key} is {wanted!r}: give the path of a UTF-8 text file, or a list of paths")
    for pattern in patterns:
        expanded = Path(pattern).expanduser()
        anchor = Path(expanded.anchor)
        found = [expanded] if expanded.exists() else sorted(anchor.glob(str(expanded.relative_to(anchor))))
        if not found:
            raise UserError(f"{key}: there is no file {pattern}; give the path of a UTF-8 text file")
        for path in found:
            if path.is_dir():
                raise UserError(f"{key}: {path} is a folder; name its files, for example {key}='{path}/*.txt'")
        paths += found
    return paths


def _content_identity(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Size and sha256 of each file: a copied, moved or touched file keeps its cache, a changed one does not."""
    identity = []
    for path in paths:
        status = path.stat()
        digest = _file_sha256(path, status.st_size, status.st_mtime_ns)
        # the name decides only whether the content is unpacked
        identity.append({"size_bytes": status.st_size, "sha256": digest, "gzip": path.suffix == ".gz"})
    return identity


@functools.lru_cache(maxsize=1024)
def _file_sha256(path: Path, size_bytes: int, modified_ns: int) -> str:
    """Of the bytes of a file; asked again for the same size and time of change it is not read again."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_HASH_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); check its permissions") from error
    return digest.hexdigest()


def _warn_of_shared_files(train: Sequence[Mapping[str, Any]], valid: Sequence[Mapping[str, Any]]) -> None:
    """Say in one line on stderr where both splits read the same file, or files of the same content."""
    if {file["sha256"] for file in train} & {file["sha256"] for file in valid}:
        print(
            "vocabfold: data.train and data.valid hold the same file: the validation loss is one of text trained on",
            file=sys.stderr,
        )


def _documents_of_file(path: Path) -> Iterator[str]:
    """The parts between ``<|endoftext|>`` lines, without the blank lines around them; empty parts are left out."""
    lines: list[str] = []
    for line in _lines(path):
        if line.strip() != END_OF_TEXT:
            lines.append(line)
            continue
        if (document := "".join(lines).strip("\r\n")).strip():
            yield document
        lines = []
    if (document := "".join(lines).strip("\r\n")).strip():
        yield document


def _lines(path: Path) -> Iterator[str]:
    offset = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                text = line.decode("utf-8")
                yield text.removeprefix("\N{BYTE ORDER MARK}") if offset == 0 else text
                offset += len(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {offset + error.start}; convert it: iconv -t UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path} to its end ({error}); fetch or unpack it again") from error


def _data_set(data: Mapping[str, Any], split: str) -> Source:
    source, column = str(_required(data, "source")), _required(data, "text_column")
    settings = {key: data.get(key) for key in ("config_name", "revision", f"{split}_split", f"max_{split}_documents")}
    split_name = _required(data, f"{split}_split")
    limit = None if data.get(f"max_{split}_documents") is None else _count(data, f"max_{split}_documents")
    local = Path(source).expanduser()
    identity = {"kind": data["name"], "text_column": column, **settings}
    if local.exists():
        files = [local] if local.is_file() else sorted(path for path in local.rglob("*") if path.is_file())
        identity |= {"names": [str(path.relative_to(local)) for path in files], "files": _content_identity(files)}
    else:
        identity |= {"source": source}

    def documents() -> Iterator[str]:
        texts = _column(_load_data_set(data, local if local.exists() else source, split_name), column, source)
        return islice(wikitext_articles(texts) if data["name"] == "wikitext" else texts, limit)

    return identity, documents


def _load_data_set(data: Mapping[str, Any], source: str | Path, split_name: str) -> Any:
    """A data set that lies on disk as Arrow files and is read from there by batches."""
    datasets = needed("datasets", "a text from Hugging Face")
    path, options = str(source), {"name": data.get("config_name"), "revision": data.get("revision")}
    if isinstance(source, Path):
        options = {"cache_dir": str(Path(_required(data, "cache_dir")).expanduser() / "datasets")}
        if source.is_file():
            kind = {".txt": "text", ".jsonl": "json"}.get(source.suffix, source.suffix.removeprefix("."))
            path, options["data_files"] = kind, str(source)
    try:
        return datasets.load_dataset(path, split=split_name, **options)
    # the library raises its own, the hub client's, the network's and Arrow's exceptions, with no common base
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot load the data set {source}, split {split_name} ({type(error).__name__}: {reason}); "
            "download it on a machine with a network and set data.source=FOLDER, "
            "or train on local files with data=text data.train=FILE data.valid=FILE"
        ) from error


def _column(data_set: Any, column: str, source: str) -> Iterator[str]:
    if column not in data_set.column_names:
        raise UserError(
            f"{source} has no column {column}; set data.text_column to one of {', '.join(data_set.column_names)}"
        )
    for batch in data_set.select_columns([column]).iter(batch_size=1000):
        yield from (text for text in batch[column] if text is not None)


def wikitext_articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText's lines joined to articles: one begins at a line `` = Title = `` (one equals sign a side) after a
    blank line.
    """
    article: list[str] = []
    after_blank = True
    for line in lines:
        line = line.rstrip("\n")
        if after_blank and _ARTICLE_HEADING.match(line):
            if (text := "\n".join(article).strip("\n")).strip():
                yield text
            article = []
        after_blank = not line.strip()
        article.append(line)
    if (text := "\n".join(article).strip("\n")).strip():
        yield text


def _zipf_identities(data: Mapping[str, Any]) -> tuple[ZipfLaw, dict[str, dict[str, Any]]]:
    """The law of a zipf corpus, and for each split what decides its tokens."""
    settings: dict[str, Any] = {key: _number(data, key) for key in ("exponent", "offset", "stay")}
    settings |= {"num_topics": _whole(data, "num_topics"), "seed": _whole(data, "seed")}
    settings |= {"id_order": _required(data, "id_order")}
    law = zipf_law(_whole(data, "vocabulary_size"), **settings)
    fixed = {"kind": "zipf", "law_sha256": _law_digest(law), **settings}
    return law, {split: {**fixed, "num_tokens": _whole(data, f"num_{split}_tokens")} for split in SPLITS}


def _zipf_corpus(data: Mapping[str, Any]) -> Corpus:
    law, identities = _zipf_identities(data)
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
        files[split] = cached_token_file(Path(_required(data, "cache_dir")), f"zipf-{split}", key, build)
    return Corpus(
        name="zipf",
        train=files["train"],
        valid=files["valid"],
        tokenizer=None,
        vocabulary_size=law.vocabulary_size,
        end_token=None,
        entropy_rate_nats=entropy_rate_nats(law),
        layout=_required(data, "layout"),
        described=_text_columns(data, files["train"]),
    )


def _law_digest(law: ZipfLaw) -> str:
    return hashlib.sha256(law.weight.tobytes() + law.topic.tobytes()).hexdigest()
