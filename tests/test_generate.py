"""Text from a trained run: the cache changes nothing, the seed decides everything, and no corpus is needed."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from run_cases import TINY, call, write_corpus
from vocabfold import generate as program
from vocabfold import train
from vocabfold.data.tokenizer import load_tokenizer
from vocabfold.errors import UserError
from vocabfold.generate import generate
from vocabfold.heads import HeadSettings
from vocabfold.heads.settings import PartitionSettings
from vocabfold.models.build import ModelSettings, ModelWithHead, build_model

VOCABULARY_SIZE = 97
MAX_POSITIONS = 12
HEADS = {
    "full": HeadSettings(tied=True),
    "scale_shift": HeadSettings(type="folded", tied=False, partition=PartitionSettings(group_size=10)),
    "linear_looped": HeadSettings(type="folded", tied=True, scorer="linear_looped"),
}
PROMPT = [3, 14, 15]


def small_model(head: str, attention: str = "gpt2") -> ModelWithHead:
    torch.manual_seed(0)
    settings = ModelSettings(
        name=attention,
        attention=attention,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        max_positions=MAX_POSITIONS,
        window=4,
    )
    model = build_model(settings, HEADS[head], VOCABULARY_SIZE).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))  # else every token is about as likely as any other
    return model


@torch.no_grad()
def greedy_without_cache(model: ModelWithHead, count: int) -> list[int]:
    """Everything computed again for each token; past the last position the later half of the text is kept."""
    text, begin = list(PROMPT), 0
    for _ in range(count):
        if len(text) - begin > MAX_POSITIONS:
            begin = len(text) - MAX_POSITIONS // 2
        hidden = model.backbone(torch.tensor([text[begin:]]))[:, -1]
        text.append(int(model.head.log_prob(hidden).argmax()))
    return text[len(PROMPT) :]


@pytest.mark.parametrize("attention", ["gpt2", "gpt_neo"])
@pytest.mark.parametrize("head", HEADS)
def test_greedy_text_is_that_of_full_recomputation_also_past_the_last_position(head: str, attention: str) -> None:
    model = small_model(head, attention)
    count = 3 * MAX_POSITIONS
    expected = greedy_without_cache(model, count)
    assert len(set(expected)) > 2  # a text that repeats one token would not notice much
    assert list(generate(model, PROMPT, count, temperature=0.0)) == expected


def test_a_prompt_longer_than_the_model_goes_on_from_its_end() -> None:
    model = small_model("full")
    prompt = [token % VOCABULARY_SIZE for token in range(5 * MAX_POSITIONS)]
    whole = list(generate(model, prompt, 1, temperature=0.0))
    assert whole == list(generate(model, prompt[-MAX_POSITIONS:], 1, temperature=0.0))


@pytest.mark.parametrize("head", HEADS)
def test_the_seed_decides_the_text(head: str) -> None:
    model = small_model(head)

    def sampled(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return list(generate(model, PROMPT, 20, temperature=1.5, generator=generator))

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_text_ends_before_the_end_token() -> None:
    model = small_model("full")
    text = list(generate(model, PROMPT, 10, temperature=0.0))
    end_token = text[4]
    ended = list(generate(model, PROMPT, 10, temperature=0.0, end_token=end_token))
    assert ended == text[: text.index(end_token)]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="prompt is empty"):
        next(generate(small_model("full"), [], 1))


@pytest.mark.parametrize("head", ["full", "paper"])
def test_the_program_continues_a_text_without_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], head: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path)
    assert call(train.main, monkeypatch, *TINY, f"head={head}", "run_dir=run") == 0
    (tmp_path / "train.txt").unlink()
    (tmp_path / "valid.txt").unlink()
    shutil.rmtree(tmp_path / "cache")
    texts = []
    for seed in ("1", "1", "2"):
        capfd.readouterr()
        arguments = ("run", "the cat saw", "--max-tokens", "30", "--seed", seed)
        assert call(program.main, monkeypatch, *arguments) == 0
        texts.append(capfd.readouterr().out)
    assert all(text.startswith("the cat saw") and text.endswith("\n") and len(text) > 30 for text in texts)
    assert texts[0] == texts[1] != texts[2]


def test_texts_are_told_apart_and_a_short_run_is_said_to_write_nonsense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path)
    assert call(train.main, monkeypatch, *TINY, "run_dir=run") == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].endswith("after 64 tokens: run")
    assert lines[0].startswith("validation loss 10.") and "(perplexity " in lines[0]
    assert lines[1] == 'continue a text with it: python -m vocabfold.generate run "Once upon a time"'
    assert call(program.main, monkeypatch, "run", "the cat", "a dog", "--max-tokens", "3") == 0
    written = capfd.readouterr()
    headings = [line for line in written.out.splitlines() if line.startswith("--- text")]
    assert headings == ["--- text 1 of 2 ---", "--- text 2 of 2 ---"]
    assert written.err.count("expect gibberish") == 1


def test_the_blank_lines_that_end_a_likeliest_text_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    blank = load_tokenizer("gpt2").encode("\n")
    monkeypatch.setattr(program, "load_settings", lambda run: Namespace(data={"name": "text", "tokenizer": "gpt2"}))
    head = Namespace(vocabulary_size=50_257, prepare_to_decode=lambda: None)
    monkeypatch.setattr(program, "load_run", lambda run, device: Namespace(head=head))
    monkeypatch.setattr(program, "beam_search", lambda *_, **__: [blank * 200])
    assert call(program.main, monkeypatch, str(tmp_path), "the end.", "--beams", "2") == 0
    assert capfd.readouterr().out == "the end.\n"


def test_an_error_in_the_middle_of_a_text_begins_on_a_line_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer("gpt2")

    def tokens() -> Iterator[int]:
        yield from tokenizer.encode(" sat")
        raise UserError("no more")

    with pytest.raises(UserError):
        program.write("the cat", tokens(), tokenizer)
    assert capfd.readouterr().out == "the cat sat\n"
