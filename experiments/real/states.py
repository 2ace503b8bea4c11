"""Hidden states of a finished model's texts, computed once and kept on disk in blocks.

A block: the states [N, D] that ``lm_head`` reads, the targets [N] and the number of each target's document [N]. Blocks
are named by a hash of the model, the text and how it is cut, and by their number, so that a larger part of a text goes
on from the blocks of a smaller one, and a killed computation from its last block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from experiments.real.loss import Piece, piece_states, pieces_of, read_texts
from vocabfold.files import file_sha256, replacing

BLOCK_TARGETS = 2048
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
    are ``most_targets`` or more."""

    path: Path
    most_targets: int
    most_of_document: int | None = None


def cached_states(
    cache: Path, model_sha256: str, part: TextPart, tokenizer: Any, load_model: Callable[[], Any]
) -> States:
    """The states of ``part``. ``load_model`` is asked for the model where a block is missing."""
    identity = {"model": model_sha256, "text": file_sha256(part.path), "most_of_document": part.most_of_document}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]
    texts = read_texts(part.path)
    pieces = pieces_of(tokenizer, texts, most_targets=part.most_targets, most_of_document=part.most_of_document)
    cache.mkdir(parents=True, exist_ok=True)
    blocks = []
    for number, block in enumerate(tqdm(list(_blocks(pieces)), desc=f"states of {part.path}", leave=False)):
        path = cache / f"states-{key}-{number}.safetensors"
        loaded = load_file(path) if path.is_file() else {}
        if len(loaded.get("targets", ())) < sum(piece.num_targets for piece in block):
            loaded = _computed(load_model(), block)
            with replacing(path) as beside:
                save_file(loaded, beside)
        blocks.append(loaded)
    states = States(**{name: torch.cat([block[name] for block in blocks]) for name in blocks[0]})
    return states.first(sum(piece.num_targets for piece in pieces))


def _blocks(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """A block ends with the piece that fills it; where it is cut does not depend on how many pieces follow."""
    block: list[Piece] = []
    for piece in pieces:
        block.append(piece)
        if sum(each.num_targets for each in block) >= BLOCK_TARGETS:
            yield block
            block = []
    if block:
        yield block


def _computed(model: Any, block: Sequence[Piece]) -> dict[str, Tensor]:
    return {
        "hidden": torch.cat([piece_states(model, piece) for piece in block]),
        "targets": torch.cat([piece.ids[1:] for piece in block]),
        "documents": torch.cat([torch.full((piece.num_targets,), piece.document) for piece in block]),
    }
