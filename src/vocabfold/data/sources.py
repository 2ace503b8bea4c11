"""Where the documents of a corpus come from: the embedded stories, local text, Hugging Face data sets.

Each source comes with its identity: what its documents are made from, by which caches know them.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from vocabfold.data.tokenizer import END_OF_TEXT
from vocabfold.data.values import count, required, whole
from vocabfold.errors import UserError, needed
from vocabfold.files import file_sha256

Source = tuple[dict[str, Any], Callable[[], Iterable[str]]]
SPLITS = ("train", "valid")
_ARTICLE_HEADING = re.compile(r"^ = (?!= ).*(?<! =) = $")


def sources_of(data: Mapping[str, Any]) -> dict[str, Source]:
    """{split: (what its documents are made from, as a key of caches, and the documents)} of a corpus of text.

    Raises UserError for a missing setting or file, and for a corpus that is no text."""
    name = required(data, "name")
    sources: dict[str, Callable[[Mapping[str, Any], str], Source]] = {
        "stories": _stories,
        "text": _text,
        "tinystories": _data_set,
        "wikitext": _data_set,
    }
    if name not in sources:
        raise UserError(f"unknown data.name {name!r}: choose one of {', '.join([*sources, 'zipf', 'shapes'])}")
    return {split: sources[name](data, split) for split in SPLITS}


def _stories(data: Mapping[str, Any], split: str) -> Source:
    from vocabfold.data import stories

    num_train, num_valid = count(data, "num_train_documents"), count(data, "num_valid_documents")
    start, stop = (0, num_train) if split == "train" else (num_train, num_train + num_valid)
    seed = whole(data, "seed")
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
        size_bytes, digest = path.stat().st_size, file_sha256(path)
        # the name decides only whether the content is unpacked
        identity.append({"size_bytes": size_bytes, "sha256": digest, "gzip": path.suffix == ".gz"})
    return identity


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
    source, column = str(required(data, "source")), required(data, "text_column")
    settings = {key: data.get(key) for key in ("config_name", "revision", f"{split}_split", f"max_{split}_documents")}
    split_name = required(data, f"{split}_split")
    limit = None if data.get(f"max_{split}_documents") is None else count(data, f"max_{split}_documents")
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
        options = {"cache_dir": str(Path(required(data, "cache_dir")).expanduser() / "datasets")}
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
