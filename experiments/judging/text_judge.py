"""What can be said of a story without understanding it, from the training text alone: the judge of any text."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from experiments.judging.base import Judge, Story, sentence_spans

NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+\b")  # within a sentence, so that no mere beginning is taken for a name
TIMES_IN_A_ROW = 3


class TextJudge(Judge):
    """Shares from 0 to 1, of the continuation alone. None of them needs to understand the text, and none proves that it
    makes sense: words shuffled within a story are all new and hardly repeat themselves.

    ``well_formed_share``: of its sentences, those that begin with a capital or a digit, end with a stop, have two words
    at least and no word three times in a row. ``known_trigrams_share``: of three words in a row, those in the training
    text. ``names_kept_share``: of the capitalised words within a sentence, those that stand in the beginning.
    ``new_sentences_share``: of its sentences, those that are not in the training text. ``distinct_bigrams_share``:
    different pairs of neighbouring words over all such pairs. Words are what stands between blanks.
    """

    name = "text"
    quantities: ClassVar[Mapping[str, str]] = {
        "well_formed_share": "Sentences well formed",
        "known_trigrams_share": "Trigrams known from training",
        "names_kept_share": "Names from the beginning",
        "new_sentences_share": "Sentences not in training",
        "distinct_bigrams_share": "Distinct word bigrams",
    }

    def __init__(self, training_documents: Iterable[str]) -> None:
        self.known_trigrams: set[tuple[str, ...]] = set()
        self.known_sentences: set[str] = set()
        for document in training_documents:
            self.known_trigrams.update(neighbours(document.split(), 3))
            self.known_sentences.update(document[start:stop] for start, stop in sentence_spans(document))

    def scores(self, stories: Sequence[Story]) -> list[dict[str, float]]:
        """One dictionary of ``quantities`` for each story."""
        return [self.scores_of(story) for story in stories]

    def scores_of(self, story: Story) -> dict[str, float]:
        """``quantities`` of one story."""
        _, sentences = story.sentences()
        words = story.continuation.split()
        bigrams = neighbours(words, 2)
        names = NAME.findall(story.continuation)
        given = set(re.findall(r"[A-Z][a-z]+", story.beginning))
        return {
            "well_formed_share": share(is_well_formed(sentence) for sentence in sentences),
            "known_trigrams_share": share(trigram in self.known_trigrams for trigram in neighbours(words, 3)),
            "names_kept_share": share(name in given for name in names),
            "new_sentences_share": share(sentence not in self.known_sentences for sentence in sentences),
            "distinct_bigrams_share": len(set(bigrams)) / len(bigrams) if bigrams else math.nan,
        }


def neighbours(words: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """Every ``count`` words in a row."""
    return list(zip(*(words[start:] for start in range(count)), strict=False))


def is_well_formed(sentence: str) -> bool:
    """See TextJudge."""
    words = sentence.split()
    repeats = max(len(list(run)) for _, run in itertools.groupby(words))
    shaped = re.fullmatch(r'["“\']?[A-Z0-9].*[.!?]["”\']?', sentence, flags=re.DOTALL)
    return shaped is not None and len(words) >= 2 and repeats < TIMES_IN_A_ROW


def share(members: Iterable[bool]) -> float:
    """Of those that hold; NaN of none."""
    flags = list(members)
    return sum(flags) / len(flags) if flags else math.nan
