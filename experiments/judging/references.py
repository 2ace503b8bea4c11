"""What scores mean: the stories' own endings, and the same spoilt in ways that every judge should notice."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from experiments.judging.base import Story, sentence_spans

OWN_ENDINGS = "the stories' own endings"
MIXED_SENTENCES = "sentences mixed between stories"
SHUFFLED_WORDS = "words mixed between stories"


def references(stories: Sequence[Story], seed: int) -> dict[str, list[Story]]:
    """Name -> stories with the beginnings of ``stories``, best first. ``seed`` of the shuffles."""
    random = np.random.default_rng(seed)
    return {
        OWN_ENDINGS: list(stories),
        MIXED_SENTENCES: mix_sentences(stories, random),
        SHUFFLED_WORDS: mix_words(stories, random),
    }


def mix_sentences(stories: Sequence[Story], random: np.random.Generator) -> list[Story]:
    """The sentences of all continuations dealt out again, as many to each story as it had; the rest of a sentence that
    the beginning left open stays, and so do spaces and paragraphs."""
    spans = []
    for story in stories:
        cut = len(story.beginning)
        inside = [span for span in sentence_spans(story.text) if span[0] >= cut]
        spans.append([(start - cut, stop - cut) for start, stop in inside])
    pool = [story.continuation[start:stop] for story, own in zip(stories, spans, strict=True) for start, stop in own]
    dealt = (pool[index] for index in random.permutation(len(pool)))
    mixed = []
    for story, own in zip(stories, spans, strict=True):
        parts, at = [], 0
        for start, stop in own:
            parts += [story.continuation[at:start], next(dealt)]
            at = stop
        mixed.append(replace(story, continuation="".join([*parts, story.continuation[at:]])))
    return mixed


def mix_words(stories: Sequence[Story], random: np.random.Generator) -> list[Story]:
    """The words of all continuations dealt out again, as many to each story as it had."""
    counts = [len(story.continuation.split()) for story in stories]
    pool = random.permutation([word for story in stories for word in story.continuation.split()]).tolist()
    starts = np.cumsum([0, *counts]).tolist()
    return [
        replace(story, continuation=" " + " ".join(pool[start:stop]))
        for story, (start, stop) in zip(stories, itertools.pairwise(starts), strict=True)
    ]
