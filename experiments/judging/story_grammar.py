"""The grammar of the embedded stories read backwards: from a sentence to the places of a story where it may stand.

Everything comes from the generator (vocabfold.data.stories): its templates, its banks, the slots that it fills from a
story's fields, and the order in which it tells its beats.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

from experiments.judging.base import sentence_boundary
from vocabfold.data.stories import ALL_PLOTS, BANK, HELPERS, LISTS, NAMES, SHARED, Plot, fields, fixed_slots, paragraphs

# Fields whose slots hang together, such as a name and its pronouns, with all the values that each can take.
ASPECTS: tuple[Mapping[str, Sequence[Any]], ...] = (
    {"hero": NAMES, "kind": LISTS["kinds"], "trait": LISTS["traits"]},
    {"hero": NAMES, "helper": HELPERS},
    {"hero": NAMES, "friend": NAMES},
    {"color": LISTS["colors"], "toy": LISTS["toys"]},
    {"place": LISTS["places"]},
    {"home": LISTS["homes"]},
    {"tie": LISTS["ties"]},
    {"weather": LISTS["weathers"]},
    {"time": LISTS["times"]},
)
Pieces = tuple[tuple[str, str | None], ...]  # of a template: literal text and the slot behind it, if there is one


class Telling(NamedTuple):
    """Where a sentence may stand: in which plot, in which of its cases, and at which beat, counted in the order in
    which a story tells them."""

    plot: str
    case: int
    beat: int


def beat_places(plot: Plot) -> dict[str, int]:
    """Beat -> its place in the order of telling; the last two beats may change places, so they share one."""
    names = [name for paragraph in paragraphs(plot, with_detail=True) for name in paragraph]
    return {name: min(place, len(names) - 2) for place, name in enumerate(names)}


def places_to_happy(plot: Plot) -> int:
    """The place of the beat in which the plot's trouble is resolved."""
    return beat_places(plot)["happy"]


def words_of_one_plot() -> dict[str, str]:
    """Word -> plot, of the words that the generator uses in the templates or cases of one plot and nowhere else."""
    everywhere = words_in(itertools.chain(*SHARED.values(), *BANK.values(), *LISTS.values()))
    everywhere |= words_in(helper.introduction for helper in HELPERS)
    users: dict[str, set[str]] = {}
    for plot in ALL_PLOTS:
        told = itertools.chain(*plot.beats.values(), *(case.values() for case in plot.cases))
        for word in words_in(told) - everywhere:
            users.setdefault(word, set()).add(plot.name)
    return {word: plots.pop() for word, plots in users.items() if len(plots) == 1}


def words_in(templates: Iterable[str]) -> set[str]:
    """The words of templates, in small letters, without their slots."""
    return {word for template in templates for word in words_of(re.sub(r"{\w+}", " ", template))}


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return re.findall(r"[a-z]+(?:['-][a-z]+)*", text.lower())


class StoryGrammar:
    """Which sentences the generator can tell, and where."""

    def __init__(self) -> None:
        self.aspects = [rows_of(aspect) for aspect in ASPECTS]
        self.values: dict[str, set[str]] = {slot: set(entries) for slot, entries in BANK.items()}
        for rows in self.aspects:
            for slot in rows[0]:
                self.values.setdefault(slot, set()).update(row[slot] for row in rows)
        self.lengths = {slot: lengths_of(values) for slot, values in self.values.items()}
        self.tellings = cache(self._tellings)  # models write the same sentence again and again
        self.words_told = cache(self._words_told)
        self._combinations = cache(self._combinations_of)

    @cached_property
    def patterns(self) -> dict[tuple[str, str | None], list[tuple[Plot, int]]]:
        """(Template of a sentence, the plot whose cases fill a slot of it) -> the plots and places it belongs to."""
        found: dict[tuple[str, str | None], list[tuple[Plot, int]]] = {}
        for plot in ALL_PLOTS:
            beats = SHARED | plot.beats
            for name, place in beat_places(plot).items():
                for template in beats[name]:
                    for sentence in self.split(template):
                        has_case = any(slot in plot.cases[0] for _, slot in pieces_of(sentence))
                        found.setdefault((sentence, plot.name if has_case else None), []).append((plot, place))
        return found

    def split(self, template: str) -> list[str]:
        """The sentences of a template, cut where experiments.judging.base cuts the texts that it gives."""
        small = [slot for slot, values in self.values.items() if all(value[0].islower() for value in values)]
        return sentence_boundary("[a-z]|{(?:" + "|".join(small) + ")}").split(template)

    def _tellings(self, sentence: str) -> frozenset[Telling]:
        """Every place of every story where the generator can tell ``sentence``; empty if it never does."""
        found: set[Telling] = set()
        for (template, own), homes in self.patterns.items():
            if longest_literal(template) not in sentence:  # saves nearly all of the reading
                continue
            for _, bound in self.readings(template, sentence, homes[0][0].cases if own else ()):
                found.update(
                    Telling(plot.name, number, place)
                    for plot, place in (homes if bound is not None and self.agrees(bound) else ())
                    for number, case in enumerate(plot.cases)
                    if not own or all(case.get(slot, phrase) == phrase for slot, phrase in (bound or {}).items())
                )
        return frozenset(found)

    def _words_told(self, sentence: str) -> float:
        """The share of the sentence's words that stand before it leaves every template; 1 for one that the generator
        can tell. A slot counts as a whole."""
        if self.tellings(sentence):
            return 1.0
        stop = max(
            stop
            for (template, own), homes in self.patterns.items()
            for stop, _ in self.readings(template, sentence, homes[0][0].cases if own else ())
        )
        ends = [word.end() for word in re.finditer(r"\S+", sentence)]
        # one that agrees with a template in every word but not in its pronouns leaves it at its last word
        return min(sum(end <= stop for end in ends), len(ends) - 1) / len(ends)

    def readings(
        self, template: str, text: str, cases: Sequence[Mapping[str, str]]
    ) -> Iterator[tuple[int, dict[str, str] | None]]:
        """Every way to fill the slots of ``template``, some of them from ``cases``, as long as ``text`` comes out.

        Yields (where it ends to agree, slot -> phrase of the slots that a story keeps); None for these where it ends
        too soon.
        """
        pieces = pieces_of(template)

        def read(index: int, at: int, bound: dict[str, str]) -> Iterator[tuple[int, dict[str, str] | None]]:
            if index == len(pieces):
                yield at, bound if at == len(text) else None
                return
            literal, slot = pieces[index]
            if not text.startswith(literal, at):
                yield at + common_words(literal, text[at : at + len(literal)]), None
                return
            at += len(literal)
            if slot is None:
                yield from read(index + 1, at, bound)
                return
            in_case = {case[slot] for case in cases if slot in case}
            values = {bound[slot]} if slot in bound else in_case or self.values[slot]
            yield at, None
            for length in self.lengths[slot] if values is self.values.get(slot) else lengths_of(values):
                value = text[at : at + length]
                if value in values:
                    # a bank is drawn from afresh each time, so its phrases need not agree
                    kept = bound if slot in BANK else bound | {slot: value}
                    yield from read(index + 1, at + length, kept)

        return read(0, 0, {})

    def agrees(self, bound: Mapping[str, str]) -> bool:
        """Whether one story can fill its slots like this: names with their pronouns, a toy with its color ..."""
        for index, rows in enumerate(self.aspects):
            slots = tuple(slot for slot in sorted(bound) if slot in rows[0])
            if len(slots) > 1 and tuple(bound[slot] for slot in slots) not in self._combinations(index, slots):
                return False
        return True

    def _combinations_of(self, index: int, slots: tuple[str, ...]) -> set[tuple[str, ...]]:
        return {tuple(row[slot] for slot in slots) for row in self.aspects[index]}


def rows_of(aspect: Mapping[str, Sequence[Any]]) -> list[dict[str, str]]:
    """The slots that hang on the fields of an aspect, for each combination of their values."""
    plain = fields(0, 0)._replace(
        case={},
        kind=next(kind for kind in LISTS["kinds"] if kind != "child"),  # called girl or boy after the hero
        helper=next(helper for helper in HELPERS if "{" not in helper.introduction),  # called his or hers
    )
    rows = []
    for combination in itertools.product(*aspect.values()):
        changed = dict(zip(aspect, combination, strict=True))
        if "hero" not in changed or changed["hero"] != changed.get("friend"):
            rows.append(fixed_slots(plain._replace(**changed)))
    varying = [slot for slot in rows[0] if len({row[slot] for row in rows}) > 1]
    return [{slot: row[slot] for slot in varying} for row in rows]


def common_words(literal: str, text: str) -> int:
    """How many characters both begin with, as whole words of ``literal``."""
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(literal, text, strict=False)))
    return common if literal[common : common + 1].isspace() else literal.rfind(" ", 0, common) + 1


def lengths_of(values: set[str]) -> list[int]:
    """How long the phrases are, each length once."""
    return sorted({len(value) for value in values})


@cache
def pieces_of(template: str) -> Pieces:
    """Literal text and slots of a template."""
    return tuple((literal, slot) for literal, slot, _, _ in string.Formatter().parse(template))


@cache
def longest_literal(template: str) -> str:
    """The longest text of a template between its slots."""
    return max((literal for literal, _ in pieces_of(template)), key=len)
