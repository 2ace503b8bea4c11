"""A tiny corpus and a tiny model for the tests that start whole programs."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from experiments.__main__ import main
from hydra._internal.hydra import Hydra

from vocabfold.runs.compose import composed_settings
from vocabfold.runs.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[1]
WORDS = ("the cat", "a dog", "the bird", "saw", "ran", "found", "sang", "red", "blue", "home", "and then", "under")
TINY = [
    "budget=steps_2",
    "data=text",
    "data.train=train.txt",
    "data.valid=valid.txt",
    "data.workers=1",
    "sequence_length=16",
    "batch_size=2",
    "model.hidden_size=16",
    "model.num_layers=2",
    "wandb.mode=disabled",
    "device=cpu",
]
# The same for models of pictures, of 16 classes.
PICTURES = [
    "data=shapes_256",
    "budget=steps_2",
    "data.image_size=32",
    "data.workers=0",
    "data.attributes={pattern:[solid],rotation_degrees:[0],colour:[red,blue],size:[huge],texture:[none],opacity:[1.0],border:[solid]}",
    "model.hidden_size=16",
    "model.num_layers=2",
    "wandb.mode=disabled",
    "device=cpu",
]
# The same text for an experiment that measures.
TEXT = ["data=text", "data.train=train.txt", "data.valid=valid.txt", "data.workers=1"]


def experiment(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """``python -m experiments ARGUMENTS`` in this process; its exit status."""
    return call(main, monkeypatch, *arguments)


def write_corpus(folder: Path) -> None:
    """train.txt and valid.txt, a few hundred words each."""
    generator = random.Random(0)
    for name, documents in (("train.txt", 20), ("valid.txt", 4)):
        texts = [" ".join(generator.choices(WORDS, k=50)) for _ in range(documents)]
        (folder / name).write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` in ``folder``, on one thread, with its token cache there."""
    environment = os.environ | {"VOCABFOLD_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def settings_of(*words: str) -> Settings:
    """The settings of the tiny run with these words behind its own."""
    return composed_settings([*TINY, *words])


def call(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """``main`` in this process with ``arguments`` as its command line; its exit status."""
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    # Hydra composes a configuration twice, first only to look for hydra.mode, which nothing here sets.
    monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: None)
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
