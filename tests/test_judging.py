"""Judges of stories: the generator's grammar accepts its own stories and notices what is spoilt; texts written on in
batches are those of one at a time."""

from __future__ import annotations

import math
import random
import re

import numpy as np
import pandas as pd
import pytest
import torch
from experiments.judging import (
    MIXED_SENTENCES,
    OWN_ENDINGS,
    SHUFFLED_WORDS,
    GrammarJudge,
    Story,
    TextJudge,
    continue_texts,
    mean_and_bootstrap,
    references,
)
from experiments.judging.base import sentence_spans
from experiments.judging.story_grammar import StoryGrammar, words_of_one_plot
from experiments.judging.text_judge import is_well_formed

from test_generate import MAX_POSITIONS, VOCABULARY_SIZE, small_model
from vocabfold.data.stories import ALL_PLOTS, fields, stories
from vocabfold.errors import UserError
from vocabfold.generate import generate

NUM_STORIES = 60
GRAMMAR = StoryGrammar()
FROM_GRAMMAR = (
    "grammar_share",
    "words_told_share",
    "consistency_share",
    "plot_words_share",
    "plot_share",
    "ending_share",
)


def cut_stories(start: int, count: int = NUM_STORIES) -> list[Story]:
    draws = random.Random(0)
    cuts = []
    for text in stories(0, start, start + count):
        cut = text.index(" ", int(draws.uniform(0.25, 0.5) * len(text)))
        cuts.append(Story(text[:cut], text[cut:], ended=True))
    return cuts


def means(judge: GrammarJudge | TextJudge, judged: list[Story]) -> dict[str, float]:
    scores = pd.DataFrame(judge.scores(judged))
    return {name: float(scores[name].mean()) for name in judge.quantities}


@pytest.fixture(scope="module")
def judge() -> GrammarJudge:
    return GrammarJudge(stories(0, 1000, 1200))


def test_every_sentence_of_a_story_is_told_where_the_generator_told_it() -> None:
    """Its own plot and case, at a beat that does not come before those of the sentences before it."""
    for index, text in enumerate(stories(0, 0, 150)):
        truth = fields(0, index)
        reached = 0
        for start, stop in sentence_spans(text):
            places = {
                telling.beat
                for telling in GRAMMAR.tellings(text[start:stop])
                if telling.plot == truth.plot.name and truth.plot.cases[telling.case] == truth.case
            }
            later = {place for place in places if place >= reached}
            assert later, text[start:stop]
            reached = min(later)


@pytest.mark.parametrize(
    ("sentence", "change", "to"),
    [
        ("Lily hugged the kite tight and thanked Mom.", "kite", "spoon"),
        ("Lily let out a long sigh.", "long", "short"),
        ("Once upon a time, there was a little girl named Lily.", "girl", "boy"),
        ("Once upon a time, there was a little girl named Lily.", "a little", "an little"),
        ("Tom had left the red kite at home.", "", ""),
        ("Tom's heart beat fast, and he felt sad.", "he", "she"),
        ("Lily gave Tom a big hug, and they laughed together.", "Tom", "Lily"),
        ('"Did you see my red kite?" asked Tom.', "kite", "kite "),
        ("They looked carefully, and there was the red kite, under a thick bush!", "under", "over"),
    ],
)
def test_a_sentence_is_accepted_and_the_same_with_an_error_is_not(sentence: str, change: str, to: str) -> None:
    assert bool(GRAMMAR.tellings(sentence)) == bool(change)
    if change:
        spoilt = sentence.replace(change, to, 1) if change != "he" else re.sub(r"\bhe\b", to, sentence)
        assert spoilt != sentence and not GRAMMAR.tellings(spoilt)
        assert 0 < GRAMMAR.words_told(spoilt) < GRAMMAR.words_told(sentence) == 1


def test_words_told_are_counted_by_hand() -> None:
    # "Lily let out a long" and no more; "long" alone of a literal that goes on is a whole word, "lon" is none
    assert GRAMMAR.words_told("Lily let out a long song.") == pytest.approx(5 / 6)
    assert GRAMMAR.words_told("Lily let out a lon") == pytest.approx(4 / 5)
    assert GRAMMAR.words_told("Xyz") == 0


def test_accepted_sentences_need_slots_that_one_case_can_fill() -> None:
    lost = next(plot for plot in ALL_PLOTS if plot.name == "lost")
    clue, spot = lost.cases[0]["clue"], lost.cases[3]["spot"]
    assert {telling.case for telling in GRAMMAR.tellings(f"The red kite was {spot}!")} == {3}
    assert {telling.case for telling in GRAMMAR.tellings(f'"No, but I can see {clue}," said Mom.')} == {0}


def test_the_grammar_ranks_own_endings_over_mixed_sentences_over_mixed_words(judge: GrammarJudge) -> None:
    scores = {name: means(judge, judged) for name, judged in references(cut_stories(0), seed=0).items()}
    own, mixed, shuffled = (scores[name] for name in (OWN_ENDINGS, MIXED_SENTENCES, SHUFFLED_WORDS))
    assert all(own[name] == 1 for name in FROM_GRAMMAR)
    assert mixed["grammar_share"] > 0.97 and shuffled["grammar_share"] == 0
    assert mixed["words_told_share"] > 0.97 and shuffled["words_told_share"] < 0.3
    for name in ("consistency_share", "plot_words_share", "plot_share", "ending_share"):
        assert own[name] > mixed[name] + 0.4 >= shuffled[name] + 0.2
    assert own["known_trigrams_share"] > mixed["known_trigrams_share"] > shuffled["known_trigrams_share"]


def test_a_text_that_is_half_right_lies_between(judge: GrammarJudge) -> None:
    """Word by word replaced by words of other stories, as a model that is trained less writes more of them."""
    whole = cut_stories(0, 30)
    words = [word for story in whole for word in story.continuation.split()]

    def spoilt(text: str, share: float) -> str:
        draws = random.Random(1)
        return re.sub(r"\S+", lambda found: draws.choice(words) if draws.random() < share else found[0], text)

    told = [
        means(judge, [Story(story.beginning, spoilt(story.continuation, share), True) for story in whole])
        for share in (0.0, 0.1, 0.3, 1.0)
    ]
    for name in ("grammar_share", "words_told_share", "consistency_share", "plot_share", "known_trigrams_share"):
        assert [scores[name] for scores in told] == sorted((scores[name] for scores in told), reverse=True), name


def test_a_story_is_followed_by_plot_case_and_order(judge: GrammarJudge) -> None:
    before = ["Then Lily tripped over a root, and the red kite fell apart.", "Lily felt sad."]
    kept = 'Mom looked at the kite and said, "I think we can fix it.'
    fixed = "They worked carefully with a drop of strong glue."
    wrong_case, other_plot = fixed.replace("a drop of strong glue", "a tiny screw"), "A storm was coming!"
    assert all(GRAMMAR.tellings(sentence) for sentence in (*before, kept, fixed, wrong_case, other_plot))
    assert judge.follow(before, [kept, fixed]) == ([True, True], True)
    assert judge.follow(before, [wrong_case, other_plot]) == ([False, False], False)
    assert judge.follow(before, [fixed, kept]) == ([True, False], True)  # help comes before the happy turn


def test_mentions_are_the_storys_own_by_hand(judge: GrammarJudge) -> None:
    story = Story(
        "Lily had a red kite. One sunny day, Lily went to the park with her friend, ",
        "Tom. A wise old owl came by. Tom gave Anna the blue kite. The owl saw Lily in the forest.",
        ended=True,
    )
    # Tom, owl, Tom yes; Anna, blue kite no; owl, Lily yes; the forest no
    assert judge.mentions_kept(story) == [True, True, True, False, False, True, True, False]
    assert math.isnan(judge.scores_of(Story("Lily sat down.", " Nothing.", True))["consistency_share"])
    assert judge.scores_of(story)["consistency_share"] == 5 / 8
    assert math.isnan(judge.scores([story])[0]["consistency_share"])  # too few for a verdict
    assert judge.scores([story] * 3)[0]["consistency_share"] == 5 / 8


def test_words_of_one_plot_stand_in_its_stories_alone() -> None:
    plots = words_of_one_plot()
    assert plots["glue"] == "broken" and plots["truth"] == "honest" and "happy" not in plots and "lily" not in plots
    assert set(plots.values()) == {plot.name for plot in ALL_PLOTS}
    for index, text in enumerate(stories(3, 0, 200)):
        told = {plots[word] for word in re.findall(r"[a-z]+", text.lower()) if word in plots}
        assert told == {fields(3, index).plot.name}


def test_what_a_text_says_by_hand() -> None:
    judge = TextJudge(["The cat sat here. The dog ran."])
    (scores,) = judge.scores([Story("Tom met Ann", " and Tom saw Bob. The dog ran. the cat sat here", ended=False)])
    # sentences: "Tom met Ann and Tom saw Bob.", then, for no capital follows the stop, "The dog ran. the cat sat here",
    # which was not ended and so left out
    assert scores["well_formed_share"] == 1 and scores["new_sentences_share"] == 1
    assert scores["names_kept_share"] == 0.5
    # trigrams: and Tom saw, Tom saw Bob., saw Bob. The, Bob. The dog, The dog ran., dog ran. the, ran. the cat,
    # the cat sat, cat sat here
    assert scores["known_trigrams_share"] == pytest.approx(1 / 9)
    assert scores["distinct_bigrams_share"] == 1
    (nothing,) = judge.scores([Story("Tom.", "", ended=True)])
    assert all(math.isnan(value) for value in nothing.values())
    assert [is_well_formed(text) for text in ("A b.", '"A b!"', "a b.", "A b", "No.", "It is is is so.")] == [
        *(True, True),
        *(False, False, False, False),
    ]


def test_sentences_end_at_stops_that_no_small_letter_follows() -> None:
    text = '"Hooray!" he cried. "Look!" Tom ran.\n\nThen he'
    assert [text[start:stop] for start, stop in sentence_spans(text)] == [
        '"Hooray!" he cried.',
        '"Look!"',
        "Tom ran.",
        "Then he",
    ]
    cut = text.index(" cried")
    assert Story(text[:cut], text[cut:], False).sentences() == ([], ['"Hooray!" he cried.', '"Look!"', "Tom ran."])
    assert Story(text[:cut], text[cut:], True).sentences()[1][-1] == "Then he"
    assert Story('"Hooray!" he cried.', " Oh", True).sentences() == (['"Hooray!" he cried.'], ["Oh"])


def test_references_keep_beginnings_and_sizes() -> None:
    whole = cut_stories(5, 20)
    spoilt = references(whole, seed=1)
    for judged in spoilt.values():
        assert [story.beginning for story in judged] == [story.beginning for story in whole]
        words = [sorted(word for story in some for word in story.continuation.split()) for some in (whole, judged)]
        assert words[0] == words[1]  # the same words, elsewhere
    assert spoilt[OWN_ENDINGS] == whole != spoilt[MIXED_SENTENCES] != spoilt[SHUFFLED_WORDS]
    assert [len(story.text.split("\n\n")) for story in spoilt[MIXED_SENTENCES]] == [5] * len(whole)


def test_bootstrap_interval() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400).tolist()
    mean, half_width = mean_and_bootstrap([*values, math.nan])
    assert mean == pytest.approx(np.mean(values))
    assert half_width == pytest.approx(1.96 * np.std(values) / 20, rel=0.1)
    assert all(math.isnan(value) for value in mean_and_bootstrap([math.nan]))
    assert mean_and_bootstrap([2.0]) == (2.0, 0.0)


@pytest.mark.parametrize("attention", ["gpt2", "gpt_neo"])
@pytest.mark.parametrize("head", ["full", "scale_shift"])
def test_greedy_batches_write_what_each_prompt_gets_alone(head: str, attention: str) -> None:
    model = small_model(head, attention)
    prompts = [[3, 14, 15], [9], [2, 6, 5, 3, 5, 8, 9], [7] * (MAX_POSITIONS - 1)]
    alone = [list(generate(model, prompt, 2 * MAX_POSITIONS, temperature=0.0)) for prompt in prompts]
    # The shortest prompt decides where the positions begin, so that of prompts within them each is as alone.
    assert continue_texts(model, prompts, 2 * MAX_POSITIONS, temperature=0.0) == alone
    end = alone[0][4]
    ended = [text[: text.index(end)] if end in text else text for text in alone]
    assert continue_texts(model, prompts, 2 * MAX_POSITIONS, temperature=0.0, end_token=end) == ended
    assert len(ended[0]) < len(alone[0])


def test_batches_of_draws_obey_their_seed_and_of_nothing_are_nothing() -> None:
    model = small_model("scale_shift")
    prompts = [[index % VOCABULARY_SIZE + 1] for index in range(5)]
    drawn = [
        continue_texts(model, prompts, 20, top_k=50, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert continue_texts(model, [], 5) == []
    with pytest.raises(UserError, match="empty"):
        continue_texts(model, [[1], []], 5)
