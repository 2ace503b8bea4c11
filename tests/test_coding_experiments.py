"""The experiments that measure coding: a table, a figure and words from a tiny text, and one-line refusals."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from run_cases import TEXT, TINY, call, experiment
from vocabfold import train


@pytest.fixture
def results(folder: Path) -> Path:
    """Where the tables of the tiny text come to lie."""
    return folder / "results" / "text"


@pytest.mark.slow
def test_token_coding_measures_every_coder(
    results: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    quick = ("--rounds", "1", "--speed-tokens", "1000", "--documents", "2")
    assert experiment(monkeypatch, "token_coding", "measure", *quick, *TEXT) == 0, capfd.readouterr().err
    table = pd.read_csv(results / "token_coding.csv")
    assert set(table["tokenizer"]) == {"gpt2", "wordpiece"} and {"rans", "blosc2"} < set(table["coder"])
    assert (table["decode_million_tokens_per_second"] > 0).all() and list(table.columns)[-1] == "command"
    assert experiment(monkeypatch, "token_coding", "draw") == 0
    assert "not met" in (results / "token_coding.md").read_text()
    before = (results / "token_coding.csv").read_bytes()
    assert experiment(monkeypatch, "token_coding", "measure", *quick, *TEXT) == 0
    assert "measured before" in capfd.readouterr().err and (results / "token_coding.csv").read_bytes() == before
    Path("train.txt").write_text("another text, and so another measurement", encoding="utf-8")
    assert experiment(monkeypatch, "token_coding", "measure", *quick, *TEXT) == 0
    assert (results / "token_coding.csv").read_bytes() != before
    assert experiment(monkeypatch, "token_coding", "measure", *TEXT, "data.train=nowhere.txt") == 2
    assert "nowhere.txt" in capfd.readouterr().err


def test_token_store_sees_the_same_losses(
    results: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = Path("train.txt").read_text(encoding="utf-8")
    Path("train.txt").write_text("\n<|endoftext|>\n".join([text] * 3), encoding="utf-8")
    assert experiment(monkeypatch, "token_store", "measure", "--steps", "2", *TEXT) == 0, capfd.readouterr().err
    assert experiment(monkeypatch, "token_store", "draw", "text") == 0
    assert "losses of all 2 steps: the same" in (results / "token_store.md").read_text()


def test_model_coding_compares_a_run_with_general_compressors(
    results: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for head in ("full", "paper"):
        assert call(train.main, monkeypatch, *TINY, f"head={head}", f"run_dir={head}") == 0
    runs = ("--run", "full=full", "--run", "paper=paper", "--rounds", "1", "--excerpt-bytes", "100")
    assert experiment(monkeypatch, "model_coding", "measure", *TEXT, *runs) == 0, capfd.readouterr().err
    table = pd.read_csv(results / "model_coding.csv").set_index("coder")
    assert {"xz -9e", "zstd -19", "brotli -11", "bzip2 -9", "model, full", "model, paper"} < set(table.index)
    assert abs(table.loc["model, paper", "excess_over_own_bits"]) < 0.2
    assert table.loc["model, paper", "decode_speed_over_full"] > 0
    assert experiment(monkeypatch, "model_coding", "draw", "text") == 0
    assert (results / "model_coding.png").stat().st_size > 1000
    assert experiment(monkeypatch, "model_coding", "measure") == 2
    assert "holds no finished run" in capfd.readouterr().err
