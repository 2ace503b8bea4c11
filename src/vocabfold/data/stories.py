"""The embedded corpus: short children's stories from a seeded grammar, the same on every machine.

A story is decoded from its index alone. A seeded Feistel permutation of ``range(NUM_DISTINCT_STORIES)`` is read as a
mixed-radix number whose digits are the story's fields (names, home, place, object, helper, plot, case ...). The text
shows every field, so two indices never give one text. Wording is drawn from a stream keyed by the seed and the index.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from vocabfold.data.story_words import BANKS, PLOTS, SHARED_BEATS
from vocabfold.errors import UserError

_MASK64 = (1 << 64) - 1
_FEISTEL_ROUNDS = 6

FIELD_WORDS = """
girls: Lily|Mia|Anna|Sara|Lucy|Emma|Sue|Amy|Ella|Zoe|Ruby|Molly|Daisy|Rosie|Kate|Nina|Jane|Clara|Maya|Ivy|Hazel|Nora|~
    Alice|Stella|Penny|Olive|Tara|Freya|Leila|Ingrid
boys: Tom|Ben|Tim|Max|Jack|Sam|Leo|Bob|Joe|Mark|Finn|Oscar|Billy|Adam|Noah|Peter|Henry|Theo|Luke|Hugo|Danny|Felix|~
    Omar|Eric|Milo|Oliver|Kofi|Ravi|Emil|Bruno
kinds: child|rabbit|bear|mouse|fox|squirrel|hedgehog|raccoon|otter|beaver|badger|elf
traits: little|curious|kind|happy|brave|shy|clever|quiet|playful|cheerful|gentle|silly|polite|sleepy|friendly|~
    stubborn|adventurous|eager|thoughtful|lively
homes: in a small house|in a cozy cottage|in a little blue house|at the edge of a village|in a busy town|~
    in a tall tower|on a quiet street|near the sea|in a green valley|in a house with a red roof|next to a bakery|~
    above a toy shop|on an old houseboat|behind a stone wall
ties: friend|best friend|neighbor|cousin|new friend|classmate|old friend|playmate
places: in the park|in the garden|in the forest|by the river|on the playground|at the beach|in the yard|on the farm|~
    by the lake|in the meadow|at the market|in the orchard|by the pond|in the woods|at the fair|on the hill|~
    in the schoolyard|at the harbor|in the vineyard|by the windmill|at the campground|in the town square|~
    by the waterfall|on the cliff|in the wheat field|at the train station|by the lighthouse|in the bamboo grove
weathers: sunny|warm|windy|bright|cloudy|cool|lovely|hot|quiet|breezy|chilly|misty|golden|fresh|gray|mild
times: day|morning|afternoon|summer day|spring morning|Saturday afternoon|Sunday morning|autumn day|Friday afternoon|~
    spring day|summer morning|autumn afternoon
toys: kite|doll|toy car|drum|toy boat|robot|toy train|whistle|puppet|toy truck|toy plane|flute|bell|lantern|~
    spinning top|crown|toy horse|music box|umbrella|pinwheel|mask|toy dragon|magic wand|rocket|toy duck|trumpet|~
    telescope|yo-yo|toy dinosaur|necklace|harmonica|toy sword|tambourine|toy lion|snow globe|toy castle|accordion|~
    toy ship|magnet|toy elephant
colors: red|blue|green|yellow|shiny|pink|purple|orange|golden|white|striped|brown|silver|spotted|black|wooden
helpers: {his} mom,Mom,f|{his} dad,Dad,m|{his} grandma,Grandma,f|{his} grandpa,Grandpa,m|a wise old owl,the owl,f|~
    {his} big sister,{his} sister,f|{his} big brother,{his} brother,m|a kind farmer,the farmer,m|~
    {his} aunt,{his} aunt,f|{his} uncle,{his} uncle,m|a friendly teacher,the teacher,f|an old gardener,the gardener,m|~
    a jolly baker,the baker,m|a slow tortoise,the tortoise,m|a smiling librarian,the librarian,f|~
    a tall mailman,the mailman,m|a busy doctor,the doctor,f|a white goose,the goose,f|a retired captain,the captain,m|~
    an elegant swan,the swan,f
"""


@dataclass(frozen=True)
class Helper:
    """Who helps: the phrase of the first mention, that of later ones, and the gender, ``f`` or ``m``."""

    introduction: str
    later: str
    gender: str


@dataclass(frozen=True)
class Plot:
    """One kind of story: its name, the shared beats it takes in, its own beats, and its cases (slot name -> phrase)."""

    name: str
    moods: tuple[str, ...]
    beats: dict[str, tuple[str, ...]]
    cases: tuple[dict[str, str], ...]


class Fields(NamedTuple):
    """What a story is about: everything that its index decides and its text shows."""

    hero: str
    home: str
    kind: str
    trait: str
    friend: str
    tie: str
    place: str
    weather: str
    time: str
    toy: str
    color: str
    helper: Helper
    plot: Plot
    case: dict[str, str]


def _parse_beats(text: str) -> dict[str, tuple[str, ...]]:
    sections = re.findall(r"^@(\w+)\s([^@]*)", text, flags=re.MULTILINE)
    return {name: tuple(re.split(r"\n| / ", body.strip())) for name, body in sections}


def _parse_plot(text: str) -> Plot:
    header, *rest = text.strip().split("\n")
    name, _, moods = header.partition(" : ")
    slots = rest[0].removeprefix("* ").split(" | ")
    rows = [case.split(" | ") for line in rest if line.startswith("- ") for case in line[2:].split(" / ")]
    cases = tuple(dict(zip(slots, row, strict=True)) for row in rows)
    return Plot(name, tuple(moods.split()), _parse_beats(text), cases)


def _parse_lists(text: str) -> dict[str, tuple[str, ...]]:
    lines = re.sub(r"~\n\s+", "", text).strip().split("\n")
    return {name: tuple(entries.split("|")) for name, _, entries in (line.partition(": ") for line in lines)}


SHARED = _parse_beats(SHARED_BEATS)
ALL_PLOTS = tuple(_parse_plot(text) for text in re.split(r"^= ", PLOTS, flags=re.MULTILINE)[1:])
BANK = _parse_lists(BANKS)
LISTS = _parse_lists(FIELD_WORDS)
NAMES = tuple(name for pair in zip(LISTS["girls"], LISTS["boys"], strict=True) for name in pair)
HELPERS = tuple(Helper(*entry.split(",")) for entry in LISTS["helpers"])


def _partnered(num_first: int, num_second: int, least: int, power: int) -> tuple[tuple[int, int], ...]:
    """Pairs of ranks in which common firsts have more partners: skewed frequencies, yet each pair occurs once."""
    return tuple(
        (first, (first + step) % num_second)
        for first in range(num_first)
        for step in range(max(least, num_second // (first + 1) ** power))
    )


_HEROES = _partnered(len(NAMES), len(LISTS["homes"]), least=2, power=1)
_KINDS = _partnered(len(LISTS["kinds"]), len(LISTS["traits"]), least=1, power=2)
_FRIENDS = _partnered(len(NAMES) - 1, len(LISTS["ties"]), least=2, power=1)
_PLACES = _partnered(len(LISTS["places"]), len(LISTS["weathers"]), least=3, power=1)
_OBJECTS = _partnered(len(LISTS["toys"]), len(LISTS["colors"]), least=4, power=1)
_CASES = tuple((plot, case) for plot in ALL_PLOTS for case in plot.cases)
_RADICES = tuple(
    len(table) for table in (_HEROES, _KINDS, _FRIENDS, _PLACES, _OBJECTS, LISTS["times"], HELPERS, _CASES)
)
_LEFT = math.prod(_RADICES[:4])
_RIGHT = math.prod(_RADICES[4:])

NUM_DISTINCT_STORIES: int = _LEFT * _RIGHT


def _mix(value: int) -> int:
    """The splitmix64 finaliser: 64 bits in, 64 well-mixed bits out."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _permute(index: int, key: int) -> int:
    """A bijection of range(NUM_DISTINCT_STORIES): an additive Feistel network on index = left * _RIGHT + right."""
    left, right = divmod(index, _RIGHT)
    for step in range(_FEISTEL_ROUNDS):
        left = (left + _mix(key ^ _mix(right ^ (2 * step << 56)))) % _LEFT
        right = (right + _mix(key ^ _mix(left ^ ((2 * step + 1) << 56)))) % _RIGHT
    return left * _RIGHT + right


def fields(seed: int, index: int) -> Fields:
    """The fields of story ``index``. Raises UserError where ``story`` does."""
    if not 0 <= seed <= _MASK64:
        raise UserError(f"story seed {seed} is out of range: choose one from 0 to 2**64 - 1")
    if not 0 <= index < NUM_DISTINCT_STORIES:
        raise UserError(f"story index {index} is out of range: ask for stories 0 to {NUM_DISTINCT_STORIES - 1}")
    number = _permute(index, _mix(seed))
    digits = []
    for radix in _RADICES:
        number, digit = divmod(number, radix)
        digits.append(digit)
    hero, home = _HEROES[digits[0]]
    kind, trait = _KINDS[digits[1]]
    friend, tie = _FRIENDS[digits[2]]
    place, weather = _PLACES[digits[3]]
    toy, color = _OBJECTS[digits[4]]
    plot, case = _CASES[digits[7]]
    return Fields(
        hero=NAMES[hero],
        home=LISTS["homes"][home],
        kind=LISTS["kinds"][kind],
        trait=LISTS["traits"][trait],
        friend=NAMES[friend + (friend >= hero)],  # skips the hero's own name
        tie=LISTS["ties"][tie],
        place=LISTS["places"][place],
        weather=LISTS["weathers"][weather],
        time=LISTS["times"][digits[5]],
        toy=LISTS["toys"][toy],
        color=LISTS["colors"][color],
        helper=HELPERS[digits[6]],
        plot=plot,
        case=case,
    )


class _Slots(dict[str, str]):
    """The fixed slots of one story; any other slot is drawn from its bank, Zipf-like, from the story's own stream."""

    def __init__(self, key: int, fixed: dict[str, str]) -> None:
        super().__init__(fixed)
        self._state = key

    def draw(self, bound: int) -> int:
        """A stable random number in range(bound)."""
        self._state = (self._state + 1) & _MASK64
        return _mix(self._state) * bound >> 64

    def pick(self, choices: tuple[str, ...]) -> str:
        """One of the choices, the first ones more often: weight 1 / (rank + 3)."""
        cumulative = _CUMULATIVE[len(choices)]
        return choices[bisect_right(cumulative, self.draw(cumulative[-1]))]

    def __missing__(self, slot: str) -> str:
        return self.pick(BANK[slot])


_LONGEST = max(
    map(len, (*BANK.values(), *SHARED.values(), *(beat for plot in ALL_PLOTS for beat in plot.beats.values())))
)
_CUMULATIVE = tuple(tuple(accumulate(10**6 // (rank + 3) for rank in range(length))) for length in range(_LONGEST + 1))
_PRONOUNS = {"f": ("she", "her", "her"), "m": ("he", "him", "his")}


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def fixed_slots(story_fields: Fields) -> dict[str, str]:
    """Slot -> phrase for every slot that a story's fields decide; all others are drawn from BANK."""
    hero_gender, friend_gender = (
        "f" if name in LISTS["girls"] else "m" for name in (story_fields.hero, story_fields.friend)
    )
    he, him, his = _PRONOUNS[hero_gender]
    kind = story_fields.kind if story_fields.kind != "child" else {"f": "girl", "m": "boy"}[hero_gender]
    introduction = story_fields.helper.introduction.replace("{his}", his)
    later = story_fields.helper.later.replace("{his}", his)
    colored_toy = f"{story_fields.color} {story_fields.toy}"
    return story_fields.case | {
        "hero": story_fields.hero,
        "he": he,
        "He": he.capitalize(),
        "him": him,
        "his": his,
        "His": his.capitalize(),
        "a_kind": _article(f"{story_fields.trait} {kind}"),
        "home": story_fields.home,
        "friend": story_fields.friend,
        "friend_he": _PRONOUNS[friend_gender][0],
        "tie": story_fields.tie,
        "in_place": story_fields.place,
        "place": story_fields.place.partition(" ")[2],
        "weather": story_fields.weather,
        "time": story_fields.time,
        "object": colored_toy,
        "a_object": _article(colored_toy),
        "toy": story_fields.toy,
        "a_helper": introduction,
        "helper": later,
        "helper_he": _PRONOUNS[story_fields.helper.gender][0],
        "Helper": later[0].upper() + later[1:],
    }


def paragraphs(plot: Plot, with_detail: bool) -> tuple[tuple[str, ...], ...]:
    """The beats of a story in the order in which they are told, a tuple a paragraph; the last two may change places."""
    return (
        ("opening", "treasure"),
        ("outing", *(("detail",) if with_detail else ()), "setup"),
        ("trouble", *plot.moods),
        ("arrival", "help"),
        ("happy", "ending", "lesson"),
    )


def story(seed: int, index: int) -> str:
    """Story ``index`` of the corpus of ``seed``: 80 to 250 words in paragraphs parted by blank lines; a pure function.

    Raises UserError unless ``0 <= seed < 2**64`` and ``0 <= index < NUM_DISTINCT_STORIES``.
    """
    story_fields = fields(seed, index)
    plot = story_fields.plot
    slots = _Slots(_mix(_mix(seed) ^ index), fixed_slots(story_fields))
    beats = SHARED | plot.beats

    def tell(*names: str) -> str:
        return " ".join([slots.pick(beats[name]).format_map(slots) for name in names])

    *before, (happy, ending, lesson) = paragraphs(plot, with_detail=slots.draw(2) == 1)
    told = [tell(*names) for names in before]
    last = (happy, ending, lesson) if slots.draw(2) else (happy, lesson, ending)
    return "\n\n".join([*told, tell(*last)])


def stories(seed: int, start: int, stop: int) -> Iterator[str]:
    """Stories ``start`` to ``stop - 1`` of the corpus of ``seed``; disjoint ranges share no story."""
    for index in range(start, stop):
        yield story(seed, index)
