"""Hidden states of a finished model's texts, computed once and kept on disk.

A file a text: the states [N, D] that ``lm_head`` reads, the targets [N] and the number of each target's document [N].
Its name holds a hash of all that decides it. A killed computation goes on after its last block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from experiments.real.loss import Piece, piece_states, pieces_of, read_texts
from vocabfold.files import replacing

BLOCK_TARGETS = 4096
KEY_DIGITS = 12


@dataclass(frozen=True)
class States:
    """``hidden`` [N, D] float32, ``targets`` [N], ``documents`` [N]."""

    hidden: Tensor
    targets: Tensor
    documents: Tensor

    def first(self, number: int) -> States:
        """The first ``number`` of them."""
        return States(self.hidden[:number], self.targets[:number], self.documents[:number])


@dataclass(frozen=True)
class TextPart:
    """Of the file at ``path`` the first documents, up to ``most_of_document`` targets of each (None: all), until there
    are ``most_targets``."""

    path: Path
    most_targets: int
    most_of_document: int | None = None


def file_sha256(path: Path) -> str:
    """Of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_states(cache: Path, model_sha256: str, part: TextPart, load_model: Callable[[], tuple[Any, Any]]) -> States:
    """The states of ``part``. ``load_model`` gives (model, tokenizer) and is asked only where something is missing."""
    identity = {
        "model": model_sha256,
        "text": file_sha256(part.path),
        "most_targets": part.most_targets,
        "most_of_document": part.most_of_document,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]
    target = cache / f"states-{key}.safetensors"
    if not target.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        _compute(target, part, *load_model())
    return States(**load_file(target))


def _compute(target: Path, part: TextPart, model: Any, tokenizer: Any) -> None:
    pieces = pieces_of(
        tokenizer, read_texts(part.path), most_targets=part.most_targets, most_of_document=part.most_of_document
    )
    blocks: list[list[Piece]] = [[]]
    for piece in pieces:
        if sum(each.num_targets for each in blocks[-1]) >= BLOCK_TARGETS:
            blocks.append([])
        blocks[-1].append(piece)
    files = []
    for number, block in enumerate(tqdm(blocks, desc=f"states of {part.path.name}")):
        files.append(target.with_suffix(f".{number}.safetensors"))
        if not files[-1].is_file():
            states = {
                "hidden": torch.cat([piece_states(model, piece) for piece in block]),
                "targets": torch.cat([piece.ids[1:] for piece in block]),
                "documents": torch.cat([torch.full((piece.num_targets,), piece.document) for piece in block]),
            }
            _save(states, files[-1])
    loaded = [load_file(file) for file in files]
    _save({name: torch.cat([each[name] for each in loaded]) for name in loaded[0]}, target)
    for file in files:
        file.unlink()


def _save(states: dict[str, Tensor], path: Path) -> None:
    with replacing(path) as beside:
        save_file({name: value.contiguous() for name, value in states.items()}, beside)
