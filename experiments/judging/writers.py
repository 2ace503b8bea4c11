"""Who writes: finished runs, and the validation stories themselves as references."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.judging.base import Story
from experiments.judging.references import references
from experiments.judging.writing import Beginning, choose_beginnings, own_stories, text_of, write_stories
from vocabfold.data.corpora import Corpus, load_corpus
from vocabfold.runs.load import load_run
from vocabfold.runs.record import finished_row
from vocabfold.runs.settings import load_settings


@dataclass
class Material:
    """A corpus, the settings that it was read by, and beginnings cut from its validation stories."""

    data: dict[str, Any]
    corpus: Corpus
    beginnings: list[Beginning]


@dataclass
class Written:
    """What the writer ``name`` made of the beginnings; ``row`` is the result row of its run, or what a reference has of
    one."""

    name: str
    row: dict[str, Any]
    material: Material
    stories: list[Story]


def written_by_runs(
    runs: Mapping[str, Sequence[Path]], num_beginnings: int, continuations: int, max_tokens: int, seed: int
) -> Iterator[Written]:
    """The stories of finished runs, ``runs`` from the name of a kind of writers to its folders.

    Runs on one corpus get the same beginnings, chosen by ``seed``, each to be continued ``continuations`` times by up
    to ``max_tokens`` tokens; a run draws with the seed of its training. Raises UserError for a corpus that is no text
    or too small.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    materials: dict[str, Material] = {}
    folders = [(name, folder) for name, of_kind in runs.items() for folder in of_kind]
    for name, folder in tqdm(folders, desc="writing"):
        settings = load_settings(folder)
        key = json.dumps(settings.data, sort_keys=True)
        if key not in materials:
            corpus = load_corpus(settings.data)
            beginnings = choose_beginnings(corpus, num_beginnings, max_tokens, seed)
            materials[key] = Material(settings.data, corpus, beginnings * continuations)
        material = materials[key]
        tokenizer = text_of(material.corpus)
        model = load_run(folder, device)
        stories = write_stories(model, material.beginnings, tokenizer, max_tokens, settings.seed)
        yield Written(name, finished_row(folder) or {}, material, stories)


def written_references(material: Material, seed: int) -> Iterator[Written]:
    """The stories' own endings, and what becomes of them when they are spoilt; ``seed`` of the shuffles."""
    own = own_stories(material.beginnings, text_of(material.corpus))
    for name, stories in references(own, seed).items():
        yield Written(name, {"corpus": material.corpus.name, "seed": seed}, material, stories)
