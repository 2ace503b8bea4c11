"""What tables of real models share: the model and texts of a command, and rows that are written as they are measured.

A measurement that was cut off goes on where it stopped: each part of it has its own identity, in the column ``run``.
"""

from __future__ import annotations

import hashlib
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from vocabfold.errors import UserError
from vocabfold.files import file_sha256, write_text
from vocabfold.hugging_face.fetch import DEFAULT_FOLDER, SMOLLM2
from vocabfold.hugging_face.models import find_model
from vocabfold.machine import origin
from vocabfold.runs.tables import RESULTS, read_rows

REAL = RESULTS / "real"
DEFAULT_MODEL = DEFAULT_FOLDER / SMOLLM2.file_name
MODEL_NAMES = {SMOLLM2.file_name: "SmolLM2-135M-Instruct"}
BYTES_AT_A_TIME = 1 << 20


def add_model(parser: ArgumentParser) -> None:
    """``--model``: a folder or GGUF file."""
    default = "what python -m vocabfold.hugging_face.fetch brings"
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help=f"folder or GGUF file (default: {default})")


def add_texts(parser: ArgumentParser) -> None:
    """``--text NAME=FILE``, several times."""
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="a text to read")


def texts_of(arguments: Namespace) -> dict[str, Path]:
    """Name -> file. Raises UserError without one, for another form and for files that are not there."""
    if wrong := [pair for pair in arguments.text or [""] if "=" not in pair]:
        raise UserError(f"--text {wrong[0]}: write NAME=FILE")
    texts = {name: Path(path) for name, _, path in (pair.partition("=") for pair in arguments.text)}
    if missing := [path for path in texts.values() if not path.is_file()]:
        raise UserError(f"there is no text {missing[0]}")
    return texts


def described(path: Path) -> dict[str, str]:
    """The columns that say which model a row is about: its name, and the SHA-256 of its files of weights."""
    digest = hashlib.sha256()
    for file in weight_files(path):
        with file.open("rb") as content:
            while block := content.read(BYTES_AT_A_TIME):
                digest.update(block)
    name = path.resolve().name
    return {"model": MODEL_NAMES.get(name, name), "model_sha256": digest.hexdigest()[:16]}


def weight_files(path: Path) -> list[Path]:
    """The files that decide what a model answers. Raises UserError where there is no model."""
    folder, gguf = find_model(path)
    return [gguf] if gguf is not None else sorted([*folder.glob("*.safetensors"), folder / "config.json"])


def sha256_of(path: Path) -> str:
    """16 hex digits of a text's content."""
    return file_sha256(path)[:16]


class GrowingTable:
    """A table whose rows are on disk as soon as they are there; ``run`` tells which of them stand already."""

    def __init__(self, name: str, path: Path | None = None) -> None:
        self.path = path or REAL / f"{name}.csv"
        self.name = name
        self.runs = set(read_rows(self.path)["run"]) if self.path.is_file() else set[str]()

    def add(self, run: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append the rows of one part of the measurement, with where they come from."""
        table = pd.DataFrame([{"run": run, "experiment": self.name, **row, **origin()} for row in rows])
        if self.path.is_file():
            table = pd.concat([read_rows(self.path), table])
        write_text(self.path, table.to_csv(index=False))
        self.runs.add(run)
