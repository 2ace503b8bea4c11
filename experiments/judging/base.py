"""What is judged and what a judge is: stories that a model wrote on from given beginnings, and scores of each."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

NUM_RESAMPLES = 1000


def sentence_boundary(small: str = "[a-z]") -> re.Pattern[str]:
    """A stop, perhaps a closing quote, blanks, and nothing ``small`` after them: `"Hooray!" he cried.` is one sentence.
    ``small`` is a pattern of what begins like a small letter."""
    return re.compile(rf'(?:(?<=[.!?])|(?<=[.!?]"))\s+(?!{small})')


_BOUNDARY = sentence_boundary()


@dataclass(frozen=True)
class Story:
    """A given ``beginning`` and the ``continuation`` of it; ``ended`` tells whether the writer ended the story itself
    or was stopped."""

    beginning: str
    continuation: str
    ended: bool

    @property
    def text(self) -> str:
        return self.beginning + self.continuation

    def sentences(self) -> tuple[list[str], list[str]]:
        """(whole sentences of the beginning, those of the continuation). A sentence across the cut belongs to the
        continuation; one at whose middle the writer was stopped to neither."""
        before: list[str] = []
        after: list[str] = []
        for start, stop in sentence_spans(self.text):
            sentence = self.text[start:stop]
            (before if stop <= len(self.beginning.rstrip()) else after).append(sentence)
        if after and not self.ended and not re.search(r"[.!?]\"?$", after[-1]):
            after.pop()
        return before, after


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """(start, stop) of each sentence of ``text``, the blanks around it left out."""
    spans = []
    start = len(text) - len(text.lstrip())
    for boundary in _BOUNDARY.finditer(text):
        if start < boundary.start():
            spans.append((start, boundary.start()))
        start = boundary.end()
    if text[start:].strip():
        spans.append((start, len(text.rstrip())))
    return spans


class Judge(ABC):
    """Gives every story its scores: a number for each of ``quantities`` (column of a table -> its title), NaN where it
    cannot be measured. ``name`` says in tables who judged."""

    name: str
    quantities: ClassVar[Mapping[str, str]]

    @abstractmethod
    def scores(self, stories: Sequence[Story]) -> list[dict[str, float]]:
        """One dictionary of ``quantities`` for each story."""


def mean_and_bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The mean of the numbers that are none of NaN, and half the width of its 95% interval, by resampling ``values``
    (percentiles of NUM_RESAMPLES means; always the same draws). (NaN, NaN) where there is no number."""
    known = np.array([value for value in values if not math.isnan(value)])
    if len(known) == 0:
        return math.nan, math.nan
    chosen = np.random.default_rng(0).integers(len(known), size=(NUM_RESAMPLES, len(known)))
    low, high = np.percentile(known[chosen].mean(axis=1), [2.5, 97.5])
    return float(known.mean()), float(high - low) / 2
