"""The embedded stories: pure, pairwise distinct, the same everywhere, and right in grammar wherever a rule can tell."""

from __future__ import annotations

import hashlib
import re
import string
import time

import pytest

from vocabfold.data import stories as module
from vocabfold.data.stories import (
    ALL_PLOTS,
    BANK,
    HELPERS,
    LISTS,
    NAMES,
    NUM_DISTINCT_STORIES,
    SHARED,
    fields,
    stories,
    story,
)
from vocabfold.errors import UserError

DIGEST_OF_200 = "6303df17820ba8c9c6415c84e1cbdd0dd3f3db336b1fc9352da1822c444fcd91"
NUM_SAMPLES = 5000
NAME_PATTERN = re.compile(rf"\b(?:{'|'.join(NAMES)})\b")
TOY_PATTERN = re.compile(rf"\b({'|'.join(LISTS['colors'])}) ({'|'.join(LISTS['toys'])})\b")
SAMPLE = list(stories(0, 0, NUM_SAMPLES))
SAMPLE_FIELDS = [fields(0, index) for index in range(NUM_SAMPLES)]


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:['-][a-z]+)*", text.lower())


def gender_of(name: str) -> str:
    return "f" if name in LISTS["girls"] else "m"


def slots_of(template: str) -> set[str]:
    return {slot for _, slot, _, _ in string.Formatter().parse(template) if slot}


def test_digest_is_pinned() -> None:
    assert hashlib.sha256("\n\n\n".join(stories(0, 0, 200)).encode()).hexdigest() == DIGEST_OF_200


def test_a_story_depends_on_seed_and_index_alone() -> None:
    assert [story(3, index) for index in reversed(range(50))] == list(stories(3, 0, 50))[::-1]
    assert not set(stories(1, 0, 500)) & set(stories(2, 0, 500))


def test_20000_stories_are_pairwise_distinct() -> None:
    assert len(set(stories(7, 0, 20_000))) == 20_000


def test_permutation_is_a_bijection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEFT", 23)
    monkeypatch.setattr(module, "_RIGHT", 41)
    for key in (0, 1, 2**63):
        image = [module._permute(index, key) for index in range(23 * 41)]
        assert sorted(image) == list(range(23 * 41))
        assert image != sorted(image)


@pytest.mark.parametrize("table", ["_HEROES", "_KINDS", "_FRIENDS", "_PLACES", "_OBJECTS"])
def test_digit_tables_hold_every_pair_once(table: str) -> None:
    pairs = getattr(module, table)
    assert len(set(pairs)) == len(pairs)


def test_no_list_repeats_an_entry() -> None:
    for entries in (*LISTS.values(), *BANK.values(), NAMES, [plot.name for plot in ALL_PLOTS]):
        assert len(set(entries)) == len(entries)
    assert len({place.partition(" ")[2] for place in LISTS["places"]}) == len(LISTS["places"])
    for plot in ALL_PLOTS:
        assert len({tuple(case.values()) for case in plot.cases}) == len(plot.cases) == 8


def test_text_shows_every_field() -> None:
    """The index is recovered from the text, field by field, each time as the only entry of its list that fits."""
    for text, truth in zip(SAMPLE, SAMPLE_FIELDS, strict=True):
        opening, outing, *_ = text.split("\n\n")
        mentioned = NAME_PATTERN.findall(text)
        assert list(dict.fromkeys(mentioned)) == [truth.hero, truth.friend]
        kind = {"f": "girl", "m": "boy"}[gender_of(truth.hero)] if truth.kind == "child" else truth.kind
        assert re.search(rf"\ban? {truth.trait} {kind}\b", opening)
        assert [home for home in LISTS["homes"] if re.search(rf"lived {home}\b|, {home}, lived", opening)] == [
            truth.home
        ]
        assert re.search(rf"\b(his|her) {truth.tie}\b", outing)
        assert re.search(rf"\b{truth.weather} {truth.time}\b", outing)
        assert truth.place in outing or f"to {truth.place.partition(' ')[2]}" in outing
        toys = {(color, toy) for color, toy in TOY_PATTERN.findall(text)}
        assert toys == {(truth.color, truth.toy)}
        possessive = {"f": "her", "m": "his"}[gender_of(truth.hero)]
        assert [helper for helper in HELPERS if helper.introduction.format(his=possessive) in text] == [truth.helper]
        assert any(phrase in text for phrase in truth.case.values())


def test_every_wording_of_a_plot_tells_its_case() -> None:
    """Some beat names the case in each of its templates, so no choice of wording can hide which case it is."""
    for plot in ALL_PLOTS:
        for slot in plot.cases[0]:
            assert any(slot in slots_of(template) for beat in plot.beats.values() for template in beat)
            assert slot not in BANK
        telling = [
            slot
            for slot in plot.cases[0]
            if len({case[slot] for case in plot.cases}) == len(plot.cases)
            and any(all(slot in slots_of(template) for template in beat) for beat in plot.beats.values())
        ]
        assert telling, plot.name


def test_templates_use_only_known_slots() -> None:
    for index, truth in enumerate(SAMPLE_FIELDS[:200]):
        known = set(module.fixed_slots(truth)) | set(BANK)
        for beat in (*SHARED.values(), *truth.plot.beats.values()):
            for template in beat:
                assert slots_of(template) <= known, (index, template)


def test_every_plot_beat_has_a_choice_of_wordings() -> None:
    assert len(ALL_PLOTS) >= 8
    for plot in ALL_PLOTS:
        assert {"setup", "trouble", "help", "happy", "lesson"} <= set(plot.beats)
        for beat in plot.beats.values():
            assert len(set(beat)) == len(beat) >= 2


def test_length_and_layout() -> None:
    lengths = [len(text.split()) for text in SAMPLE]
    assert min(lengths) >= 80 and max(lengths) <= 250
    assert 135 <= sum(lengths) / len(lengths) <= 175
    for text in SAMPLE:
        assert not re.search(r"[{}~|@/_]|  |<\||\n\n\n", text)
        assert len(text.split("\n\n")) == 5 and text.count("\n") == 8


def test_sentences_begin_with_a_capital_and_end_with_a_stop() -> None:
    for text in SAMPLE:
        for paragraph in text.split("\n\n"):
            assert paragraph.count('"') % 2 == 0
            assert re.fullmatch(r'"?[A-Z].*[.!?]"?', paragraph)
            for start in re.findall(r'(?:[.]"?|(?<!")[!?]) ("?\w)', paragraph):
                assert start[-1].isupper(), paragraph
            for quote in re.findall(r'"([^"]*)"', paragraph):
                assert re.search(r"[.!?,]$", quote), paragraph


def test_articles_agree_with_the_next_word() -> None:
    text = "\n".join(SAMPLE)
    assert not re.findall(r"\b[Aa] [aeiou]\w*", text)
    assert not re.findall(r"\b[Aa]n [^aeiou]\w*", text)
    assert {"an orange", "an eager", "an old", "an elf"} & set(re.findall(r"\ban \w+", text)) >= {
        "an orange",
        "an eager",
    }


def test_pronouns_agree_with_the_characters() -> None:
    pronouns = {"f": {"she", "her", "hers", "herself"}, "m": {"he", "him", "his", "himself"}}
    lone_pairs = 0
    for text, truth in zip(SAMPLE, SAMPLE_FIELDS, strict=True):
        genders = {gender_of(truth.hero), gender_of(truth.friend), truth.helper.gender}
        used = set(words_of(text))
        assert used & pronouns[gender_of(truth.hero)]
        for gender in {"f", "m"} - genders:
            lone_pairs += 1
            assert not used & pronouns[gender], text
    assert lone_pairs > NUM_SAMPLES / 6


def test_the_friends_pronoun_only_follows_the_friends_name() -> None:
    """Where only the friend is of a gender, each pronoun of that gender stands close behind the friend's name."""
    checked = 0
    for text, truth in zip(SAMPLE, SAMPLE_FIELDS, strict=True):
        if gender_of(truth.hero) == truth.helper.gender != gender_of(truth.friend):
            pronoun = {"f": r"\b[Ss]he\b", "m": r"\b[Hh]e\b"}[gender_of(truth.friend)]
            for found in re.finditer(pronoun, text):
                assert truth.friend in text[max(0, found.start() - 110) : found.start()], text
                checked += 1
    assert checked > 100


def test_vocabulary_is_rich_and_skewed() -> None:
    counts: dict[str, int] = {}
    for text in SAMPLE:
        for word in words_of(text):
            counts[word] = counts.get(word, 0) + 1
    assert len(counts) >= 1200
    frequencies = sorted(counts.values(), reverse=True)
    assert sum(frequencies[:100]) > 0.5 * sum(frequencies)
    heroes = [truth.hero for truth in SAMPLE_FIELDS]
    assert heroes.count(NAMES[0]) > 4 * heroes.count(NAMES[-1]) > 0


def test_every_list_entry_occurs() -> None:
    corpus = "\n".join(SAMPLE)
    for field, key in zip(
        ("kind", "trait", "home", "tie", "place", "weather", "time", "toy", "color"),
        ("kinds", "traits", "homes", "ties", "places", "weathers", "times", "toys", "colors"),
        strict=True,
    ):
        assert {getattr(truth, field) for truth in SAMPLE_FIELDS} == set(LISTS[key])
    for names in ([truth.hero for truth in SAMPLE_FIELDS], [truth.friend for truth in SAMPLE_FIELDS]):
        assert set(names) == set(NAMES)
    assert {truth.helper for truth in SAMPLE_FIELDS} == set(HELPERS)
    assert {truth.plot.name for truth in SAMPLE_FIELDS} == {plot.name for plot in ALL_PLOTS}
    for plot in ALL_PLOTS:
        for case in plot.cases:
            for phrase in case.values():
                assert phrase in corpus, phrase
    for entries in BANK.values():
        for entry in entries:
            assert entry in corpus, entry


@pytest.mark.parametrize(
    ("seed", "index"), [(0, -1), (0, NUM_DISTINCT_STORIES), (0, NUM_DISTINCT_STORIES + 5), (-1, 0), (2**64, 0)]
)
def test_out_of_range_is_refused_in_one_line(seed: int, index: int) -> None:
    with pytest.raises(UserError, match="out of range") as refusal:
        story(seed, index)
    assert "\n" not in str(refusal.value)
    assert story(0, NUM_DISTINCT_STORIES - 1)


def test_3000_stories_a_second() -> None:
    start = time.process_time()
    assert sum(1 for _ in stories(11, 0, 3000)) == 3000
    assert time.process_time() - start < 1.0
