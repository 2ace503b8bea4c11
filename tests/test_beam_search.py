"""Beam search against all texts there are, against a beam in plain Python without a cache, and against greedy text."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from run_cases import TINY, call, write_corpus
from vocabfold import generate as program
from vocabfold import train
from vocabfold.errors import UserError
from vocabfold.generate import generate
from vocabfold.heads import HeadSettings
from vocabfold.heads.settings import PartitionSettings
from vocabfold.inference.beam_search import beam_search
from vocabfold.models.build import ModelSettings, ModelWithHead, build_model

MAX_POSITIONS = 9
HEADS = {
    "full": HeadSettings(tied=True),
    "scale_shift": HeadSettings(type="folded", tied=False),
    "shortlist": HeadSettings(
        type="folded", tied=False, scorer="linear_sorted", partition=PartitionSettings(shortlist=2)
    ),
}
PROMPT = [1, 3, 2]
END = 0
every_head = pytest.mark.parametrize("head", HEADS)
every_penalty = pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])


def small_model(head: str, vocabulary_size: int, attention: str = "gpt2", seed: int = 0) -> ModelWithHead:
    torch.manual_seed(seed)
    settings = ModelSettings(
        name=attention,
        attention=attention,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        max_positions=MAX_POSITIONS,
        window=4,
    )
    model = build_model(settings, HEADS[head], vocabulary_size).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def next_log_prob(model: ModelWithHead, texts: list[tuple[int, ...]]) -> list[list[float]]:
    """log P of every next token after PROMPT and each of ``texts``, computed again from the beginning."""
    begin = 0
    for length in range(len(PROMPT) + 1, len(PROMPT) + len(texts[0]) + 1):
        if length - begin > MAX_POSITIONS:
            begin = length - MAX_POSITIONS // 2
    rows = [[*PROMPT, *text][begin:] for text in texts]
    result: list[list[float]] = model.head.log_prob(model.backbone(torch.tensor(rows))[:, -1]).tolist()
    return result


def best_of_all(
    model: ModelWithHead, vocabulary_size: int, max_tokens: int, length_penalty: float
) -> tuple[list[int], float]:
    """Every text of up to ``max_tokens`` tokens, looked at."""
    log_prob: dict[tuple[int, ...], float] = {(): 0.0}
    finished: dict[tuple[int, ...], float] = {}
    for length in range(1, max_tokens + 1):
        texts = list(log_prob)
        after = next_log_prob(model, texts)
        log_prob = {
            (*text, token): log_prob[text] + row[token]
            for text, row in zip(texts, after, strict=True)
            for token in range(vocabulary_size)
        }
        ended = {text for text in log_prob if text[-1] == END or length == max_tokens}
        finished |= {text: log_prob[text] for text in ended}
        log_prob = {text: value for text, value in log_prob.items() if text not in ended}
    best = max(finished, key=lambda text: finished[text] / len(text) ** length_penalty)
    return [token for token in best if token != END], finished[best]


def plain_beam(model: ModelWithHead, num_beams: int, max_tokens: int, length_penalty: float) -> tuple[list[int], float]:
    """The definition: the best ``num_beams`` successors of all texts, less one for each text that ended."""
    beam: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished: list[tuple[tuple[int, ...], float]] = []
    for length in range(1, max_tokens + 1):
        after = next_log_prob(model, [text for text, _ in beam])
        successors = [
            ((*text, token), score + value)
            for (text, score), row in zip(beam, after, strict=True)
            for token, value in enumerate(row)
        ]
        successors = sorted(successors, key=lambda pair: -pair[1])[: num_beams - len(finished)]
        finished += [pair for pair in successors if pair[0][-1] == END or length == max_tokens]
        beam = [pair for pair in successors if pair not in finished]
        if not beam:
            break
    text, score = max(finished, key=lambda pair: pair[1] / len(pair[0]) ** length_penalty)
    return [token for token in text if token != END], score


@every_head
@every_penalty
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_wide_enough_finds_the_best_of_all_texts(head: str, length_penalty: float, seed: int) -> None:
    vocabulary_size, max_tokens = 5, 4
    model = small_model(head, vocabulary_size, seed=seed)
    settings = {"num_beams": vocabulary_size**max_tokens, "length_penalty": length_penalty}
    tokens, log_prob = beam_search(model, PROMPT, max_tokens, **settings, end_token=END)
    expected_tokens, expected = best_of_all(model, vocabulary_size, max_tokens, length_penalty)
    assert tokens == expected_tokens
    assert log_prob == pytest.approx(expected, rel=1e-9)


@every_head
@pytest.mark.parametrize("attention", ["gpt2", "gpt_neo"])
@pytest.mark.parametrize("num_beams", [1, 2, 5])
def test_a_narrow_beam_is_the_one_without_a_cache(head: str, attention: str, num_beams: int) -> None:
    """Texts run past the last position, where the later half is read in again; some end earlier."""
    for seed, length_penalty in enumerate((0.0, 1.0)):
        model = small_model(head, 23, attention, seed)
        settings = {"num_beams": num_beams, "length_penalty": length_penalty}
        tokens, log_prob = beam_search(model, PROMPT, 2 * MAX_POSITIONS, **settings, end_token=END)
        expected_tokens, expected = plain_beam(model, num_beams, 2 * MAX_POSITIONS, length_penalty)
        assert tokens == expected_tokens
        assert log_prob == pytest.approx(expected, rel=1e-9)


@every_head
@pytest.mark.parametrize("seed", range(2))
def test_one_beam_is_greedy(head: str, seed: int) -> None:
    model = small_model(head, 23, seed=seed)
    endless = list(generate(model, PROMPT, 3 * MAX_POSITIONS, temperature=0.0))
    assert beam_search(model, PROMPT, 3 * MAX_POSITIONS, num_beams=1)[0] == endless
    end_token = endless[7]
    ended = list(generate(model, PROMPT, 3 * MAX_POSITIONS, temperature=0.0, end_token=end_token))
    assert len(ended) < len(endless)
    assert beam_search(model, PROMPT, 3 * MAX_POSITIONS, num_beams=1, end_token=end_token)[0] == ended


def test_more_beams_find_a_likelier_text_than_greedy() -> None:
    gains = []
    for seed in range(6):
        model = small_model("scale_shift", 23, seed=seed)
        settings = {"length_penalty": 0.0, "end_token": None}
        narrow, wide = (beam_search(model, PROMPT, 5, num_beams=beams, **settings)[1] for beams in (1, 50))
        gains.append(wide - narrow)
    assert max(gains) > 0.01 and min(gains) > -1e-9


def test_more_beams_than_tokens_there_are() -> None:
    model = small_model("full", 5)
    assert len(beam_search(model, PROMPT, 3, num_beams=50)[0]) == 3


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ([], {"num_beams": 2}, "prompt is empty"),
        (PROMPT, {"num_beams": 0}, "number of beams is 0: choose at least 1"),
        (PROMPT, {"num_beams": 2, "length_penalty": -1.0}, "length penalty is -1.0"),
        (PROMPT, {"num_beams": 2, "length_penalty": float("nan")}, "length penalty is nan"),
    ],
)
def test_impossible_settings_are_refused(prompt: list[int], settings: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        beam_search(small_model("full", 5), prompt, 3, **settings)  # type: ignore[arg-type]


def test_the_program_searches_and_refuses_what_does_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path)
    assert call(train.main, monkeypatch, *TINY, "head=paper", "run_dir=run") == 0
    texts = []
    for options in (["--beams", "1"], ["--temperature", "0"], ["--beams", "3", "--length-penalty", "0"]):
        capfd.readouterr()
        assert call(program.main, monkeypatch, "run", "the cat saw", "--max-tokens", "20", *options) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1]
    assert all(text.startswith("the cat saw") and text.endswith("\n") for text in texts)
    for options, words in (
        (["--beams", "2", "--top-p", "0.9"], "--top-p is for drawing"),
        (["--beams", "2", "--temperature", "1"], "--temperature is for drawing"),
        (["--length-penalty", "1"], "give both or neither"),
        (["--beams", "0"], "number of beams is 0"),
        (["--beams", "two"], "--beams"),
    ):
        assert call(program.main, monkeypatch, "run", "the cat saw", *options) == 2
        written = capfd.readouterr().err
        assert written.count("\n") == 1 and words in written


def test_all_texts_are_looked_at() -> None:
    """The reference itself: as many texts as there are, and their probabilities sum to 1."""
    model = small_model("full", 4)
    total = 0.0
    for text in itertools.product(range(4), repeat=3):
        rows = [next_log_prob(model, [text[:length]])[0][text[length]] for length in range(3)]
        total += torch.tensor(sum(rows)).exp().item()
    assert total == pytest.approx(1.0)
