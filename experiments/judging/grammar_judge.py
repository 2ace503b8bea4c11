"""A judge that needs nobody: the generator of the embedded stories knows what a story of its kind may say, and when."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from experiments.judging.base import Judge, Story
from experiments.judging.story_grammar import StoryGrammar, Telling, places_to_happy, words_of, words_of_one_plot
from experiments.judging.text_judge import TextJudge, share
from vocabfold.data.stories import ALL_PLOTS, HELPERS, NAMES

WORD = re.compile(r"[A-Za-z-]+")
# How many of a kind one story of the generator has.
ROLES = {"name": 2, "object": 1, "place": 1, "helper": 1}
LEAST_COUNT = 20  # mentions or plot words in all stories together: of fewer nothing follows
HAPPY = {plot.name: places_to_happy(plot) for plot in ALL_PLOTS}


class GrammarJudge(Judge):
    """Of an embedded story's continuation, by the grammar behind its beginning; shares, but for ``mentions`` and
    ``plot_words``, which are numbers. Shares of fewer than LEAST_COUNT of these in all stories are NaN.

    * ``grammar_share``: of its sentences, those that the generator can tell with some choice of words, pronouns in
      agreement; ``words_told_share``: of the words of a sentence, those before it leaves every template of the
      generator, the mean over sentences: tells weak models apart, whose whole sentences are never right
    * ``consistency_share``: of its mentions of names, objects, places and helpers, those of the two names, the one
      object, place and helper that the story mentioned first
    * ``plot_share``: of its sentences, those that carry on the story: of the plot and the case of it that were begun,
      and not of an earlier beat than it has reached; ``plot_words_share``: of the words that only one plot uses, those
      of the plot that the beginning tells, if it tells one; ``ending_share``: 1 if the story comes to the happy
      turn of the plot that was begun, else 0
    * and what TextJudge says of it
    """

    name = "grammar"
    quantities: ClassVar[Mapping[str, str]] = {
        "grammar_share": "Sentences in the grammar",
        "words_told_share": "Words within the grammar",
        "consistency_share": "Consistent mentions",
        "mentions": "Mentions (a story)",
        "plot_words_share": "Plot words of the right plot",
        "plot_words": "Plot words (a story)",
        "plot_share": "Sentences on the plot",
        "ending_share": "Stories that end as begun",
        **TextJudge.quantities,
    }

    def __init__(self, training_documents: Iterable[str]) -> None:
        self.text_judge = TextJudge(training_documents)
        self.grammar = StoryGrammar()
        self.mentions = phrases_of_roles(self.grammar)
        self.plot_of_word = words_of_one_plot()
        self.longest = max(len(phrase) for phrase in self.mentions)

    def scores(self, stories: Sequence[Story]) -> list[dict[str, float]]:
        """One dictionary of ``quantities`` for each story."""
        scores = [self.scores_of(story) | self.text_judge.scores_of(story) for story in stories]
        for of_few, count in (("consistency_share", "mentions"), ("plot_words_share", "plot_words")):
            if sum(each[count] for each in scores) < LEAST_COUNT:
                scores = [each | {of_few: math.nan} for each in scores]
        return scores

    def scores_of(self, story: Story) -> dict[str, float]:
        """The quantities that the grammar gives for one story."""
        before, after = story.sentences()
        carried, is_happy = self.follow(before, after)
        mentions = self.mentions_kept(story)
        told = [self.grammar.words_told(sentence) for sentence in after]
        plot_words = self.plot_words_kept(before, story.continuation)
        return {
            "grammar_share": share(bool(self.grammar.tellings(sentence)) for sentence in after),
            "words_told_share": sum(told) / len(told) if told else math.nan,
            "consistency_share": share(mentions),
            "mentions": len(mentions),
            "plot_words_share": share(plot_words),
            "plot_words": len(plot_words),
            "plot_share": share(carried),
            "ending_share": float(is_happy),
        }

    def follow(self, before: Sequence[str], after: Sequence[str]) -> tuple[list[bool], bool]:
        """(which sentences of ``after`` carry the story on, whether one of them tells the happy turn)."""
        stories = {(plot.name, number) for plot in ALL_PLOTS for number in range(len(plot.cases))}
        reached, carried, is_happy = 0, [], False
        for sentence in (*before, *after):
            fitting = {
                telling
                for telling in self.grammar.tellings(sentence)
                if (telling.plot, telling.case) in stories and telling.beat >= reached
            }
            carried.append(bool(fitting))
            if fitting:
                stories = {(telling.plot, telling.case) for telling in fitting}
                reached = min(telling.beat for telling in fitting)
                is_happy |= len(carried) > len(before) and all(is_at_happy(telling) for telling in fitting)
        return carried[len(before) :], is_happy

    def plot_words_kept(self, before: Sequence[str], continuation: str) -> list[bool]:
        """Whether each word that only one plot uses is of the plot that ``before`` tells; [] where it tells none."""
        plots = {telling.plot for sentence in before for telling in self.grammar.tellings(sentence)}
        for sentence in before:
            plots &= {telling.plot for telling in self.grammar.tellings(sentence)}
        if len(plots) != 1:
            return []
        told = [self.plot_of_word[word] for word in words_of(continuation) if word in self.plot_of_word]
        return [plot in plots for plot in told]

    def mentions_kept(self, story: Story) -> list[bool]:
        """Whether each mention in the continuation is one of the story's own."""
        first: dict[str, list[str]] = {role: [] for role in ROLES}
        kept = []
        for place, role, who in self.mentioned(story.text):
            known = first[role]
            if who not in known and len(known) < ROLES[role]:
                known.append(who)
            if place >= len(story.beginning.rstrip()):
                kept.append(who in known)
        return kept

    def mentioned(self, text: str) -> list[tuple[int, str, str]]:
        """(where it stops, role, who or what) of each mention in ``text``; of several from one word on the longest."""
        words = list(WORD.finditer(text))
        found, index = [], 0
        while index < len(words):
            for count in range(self.longest, 0, -1):
                phrase = tuple(word[0] for word in words[index : index + count])
                if len(phrase) == count and phrase in self.mentions:
                    found.append((words[index + count - 1].end(), *self.mentions[phrase]))
                    index += count - 1
                    break
            index += 1
        return found


def is_at_happy(telling: Telling) -> bool:
    """Whether it is the beat that resolves the plot's trouble."""
    return telling.beat == HAPPY[telling.plot]


def phrases_of_roles(grammar: StoryGrammar) -> dict[tuple[str, ...], tuple[str, str]]:
    """The words of each mention -> (role, who or what), as the generator fills its slots."""
    phrases = {name: ("name", name) for name in NAMES}
    for role in ("object", "place"):
        phrases |= {phrase: (role, phrase) for phrase in grammar.values[role]}
    for helper, pronoun in itertools.product(HELPERS, ("his", "her")):
        for words in (helper.introduction, helper.later):
            phrase = words.replace("{his}", pronoun)
            phrases |= dict.fromkeys((phrase, phrase[0].upper() + phrase[1:]), ("helper", helper.introduction))
    return {tuple(WORD.findall(phrase)): identity for phrase, identity in phrases.items()}
