"""table1_story_quality as a program: stories of tiny runs are written, judged in two ways, and drawn."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
from experiments.judging import (
    MIXED_SENTENCES,
    OWN_ENDINGS,
    SHUFFLED_WORDS,
)
from experiments.judging.language_model import RANGES

from run_cases import REPOSITORY, TEXT, TINY, call, experiment, write_corpus
from vocabfold import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of main_comparison with each head, and the published table."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("VOCABFOLD_CACHE", str(folder / "cache"))
        write_corpus(folder)
        for head in ("full", "paper"):
            assert call(train.main, monkeypatch, *TINY, f"head={head}", "experiment=main_comparison") == 0
    shutil.copytree(REPOSITORY / "results" / "paper", folder / "results" / "paper")
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them as the current folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="module")
def measured(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of them with the table of what the text says of itself."""
    folder = tmp_path_factory.mktemp("measured") / "folder"
    shutil.copytree(trained, folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("VOCABFOLD_CACHE", str(folder / "cache"))
        assert measure(monkeypatch) == 0
    return folder


@pytest.fixture
def judged(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that as the current folder."""
    shutil.copytree(measured, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path


def measure(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    small = ("--beginnings", "3", "--max-tokens", "5")
    return experiment(monkeypatch, "table1_story_quality", "measure", *TEXT, *small, *arguments)


def test_the_program_writes_judges_and_draws(
    judged: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = judged / "results" / "text"
    table = pd.read_csv(folder / "table1_story_quality.csv")
    assert sorted(table["writer"]) == sorted(["trained"] * 2 + [OWN_ENDINGS, MIXED_SENTENCES, SHUFFLED_WORDS])
    assert set(table["judge"]) == {"text"} and "grammar_share" not in table  # nobody knows this text's grammar
    assert table["known_trigrams_share"].notna().all() and (table["stories"] == 3).all()
    first = (folder / "table1_story_quality.csv").read_bytes()
    assert measure(monkeypatch) == 0 and "measured before" in capfd.readouterr().err
    assert (folder / "table1_story_quality.csv").read_bytes() == first
    assert experiment(monkeypatch, "table1_story_quality", "draw", "text") == 0
    lines = (folder / "table1_story_quality.md").read_text()
    assert "| GPT-2 128 | published: language model, of 10 | 3.80 | 4.22 |" in lines and "| GPT-2 16, full |" in lines
    assert (folder / "table1_story_quality_stories.md").read_text().count("## …") == 3


def test_a_language_model_judges_beside_what_was_judged_before(
    judged: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.judging.LanguageModelJudge.answer", lambda *_: dict.fromkeys(RANGES, 5.0))
    judge = ("--judge", "language-model", "--judge-model", "m", "--base-url", "http://127.0.0.1:9/v1")
    price = ("--dollars-per-million", "2", "10")
    path = judged / "results" / "text" / "table1_story_quality.csv"
    assert measure(monkeypatch, *judge, *price) == 2  # nobody is there to agree
    said = capfd.readouterr()
    assert " requests, about " in said.out and "about $" in said.out and "add --yes" in said.err
    assert set(pd.read_csv(path)["judge"]) == {"text"}
    assert measure(monkeypatch, *judge, "--yes") == 0
    table = pd.read_csv(path)
    assert table["judge"].value_counts().to_dict() == {"text": 5, "language model m": 5}
    assert table["known_trigrams_share"].notna().sum() == 5 and (table["plot_of_10"].dropna() == 5).all()
    assert experiment(monkeypatch, "table1_story_quality", "draw", "text") == 0
    assert "| GPT-2 16, full | language model m, of 10 | 5.000" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--beginnings", "99"), "99 beginnings are wanted"),
        (("--max-tokens", "0"), "--max-tokens is 0"),
        (
            ("--judge", "language-model", "--judge-model", "m", "--max-answer-tokens", "0"),
            "--max-answer-tokens is 0: choose at least 1",
        ),
        (("--judge", "language-model"), "needs --judge-model"),
        (("--judge", "language-model", "--judge-model", "m"), "OPENAI_API_KEY"),
        (("--nonsense",), "unrecognized"),
    ],
)
def test_complaints_are_one_line(
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    capfd.readouterr()
    assert measure(monkeypatch, *arguments) == 2
    last = capfd.readouterr().err.replace("\r", "\n").rstrip("\n").splitlines()[-1]
    assert words in last and not list((runs / "results").glob("text/table1*"))


def test_without_runs_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert measure(monkeypatch) == 2
    assert "`make paper` first" in capfd.readouterr().err
