"""The content of a corpus as a SHA-256 of each part, which decides a run's identity and names the text in tables."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vocabfold.data.shapes import load_shapes
from vocabfold.data.sources import SPLITS, sources_of
from vocabfold.data.tokenizer import END_OF_TEXT
from vocabfold.data.values import number, required, whole
from vocabfold.data.zipf import ZipfLaw, zipf_law
from vocabfold.files import write_text


def content_sha256(data: Mapping[str, Any]) -> dict[str, str]:
    """{train: .., valid: ..}: the SHA-256 of what a resolved conf/data node holds, wherever it lies.

    Of a local file it is that of its bytes, of several that of theirs, one a line; of documents from elsewhere that of
    the file of text that would hold them; of what is drawn at random that of what decides it. Raises UserError for data
    that cannot be read.
    """
    name = required(data, "name")
    if name == "shapes":
        return dict.fromkeys(SPLITS, load_shapes(data).sha256)
    if name == "zipf":
        _, identities = zipf_identities(data)
        return {split: _json_sha256(identity) for split, identity in identities.items()}
    if name == "text":
        return {split: _files_sha256(identity["files"]) for split, (identity, _) in sources_of(data).items()}
    return {
        split: _documents_sha256(Path(required(data, "cache_dir")), identity, documents)
        for split, (identity, documents) in sources_of(data).items()
    }


def zipf_identities(data: Mapping[str, Any]) -> tuple[ZipfLaw, dict[str, dict[str, Any]]]:
    """The law of a zipf corpus, and for each split what decides its tokens."""
    settings: dict[str, Any] = {key: number(data, key) for key in ("exponent", "offset", "stay")}
    settings |= {"num_topics": whole(data, "num_topics"), "seed": whole(data, "seed")}
    settings |= {"id_order": required(data, "id_order")}
    law = zipf_law(whole(data, "vocabulary_size"), **settings)
    fixed = {"kind": "zipf", "law_sha256": _law_sha256(law), **settings}
    return law, {split: {**fixed, "num_tokens": whole(data, f"num_{split}_tokens")} for split in SPLITS}


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


def _law_sha256(law: ZipfLaw) -> str:
    return hashlib.sha256(law.weight.tobytes() + law.topic.tobytes()).hexdigest()
