"""Experiments on finished models, on a tiny one: what stands is not measured again, and tables say what they must."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from experiments.real import real_coding, real_embedding
from experiments.real.real_embedding import Way

from run_cases import experiment
from test_hugging_face_coding import TEXT, folder
from vocabfold.hugging_face import load

__all__ = ["folder"]  # a fixture
DOCUMENTS = ["the cat sat on that mat\nand ate\n", "a hat that the rat had\n", "at that the cat sat\n"]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "valid.txt"
    path.write_text("<|endoftext|>\n".join(DOCUMENTS * 2))
    return path


def test_embeddings_are_compared_and_not_twice(
    folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("real_embedding", "measure", "--model", str(folder), "--text", f"cats={text}", "--documents", "5")
    assert experiment(monkeypatch, *words, "--only", "dense", "int8") == 0
    path = Path("results/real/real_embedding.csv")
    first = pd.read_csv(path)
    assert list(first["embedding"]) == ["dense", "int8", "int8"]  # the untied model has no rows with both sides
    assert experiment(monkeypatch, *words) == 0
    table = pd.read_csv(path)
    pd.testing.assert_frame_equal(table.iloc[:3][first.columns], first, check_dtype=False)
    assert {"int4", "low_rank", "tt_matrix", "tensor_train"} < set(table["embedding"])
    assert (table["documents"] == 5).all() and table["run"].is_unique
    losses = table["document_loss_nats"].map(lambda cell: real_embedding.numbers_in(cell).sum())
    np.testing.assert_allclose(losses / table["tokens"], table["loss_nats"], atol=1e-4)
    half = table[(table["numbers"] == "bfloat16") & (table["embedding"] == "low_rank")].iloc[0]
    assert half["compression"] >= half["wanted_compression"]
    before = path.read_bytes()
    assert experiment(monkeypatch, *words) == 0
    assert path.read_bytes() == before and "measured before" in capsys.readouterr().out
    assert experiment(monkeypatch, "real_embedding", "draw") == 0
    told = path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").is_file()
    assert "Goal, 7x at a perplexity of at most 1.01" in told and "| int8 | a scale a row |" in told


def test_half_as_long_numbers_are_really_rounded(folder: Path) -> None:
    model, _ = load(folder)
    _, whole = real_embedding.compressed(model, Way("low_rank", {"compression": 4}))
    _, half = real_embedding.compressed(model, Way("low_rank", {"compression": 4}, numbers="bfloat16"))
    columns = [
        real_embedding.embedding_columns(Way("low_rank", {"compression": 4}, numbers), each, whole.rows(0, 300))
        for numbers, each in (("float32", whole), ("bfloat16", half))
    ]
    assert columns[1]["compression"] == 2 * columns[0]["compression"]
    assert 0 < columns[1]["relative_error"] < 0.01
    assert torch.equal(half.narrow, half.narrow.bfloat16().float())


def test_texts_are_coded_and_decoded_on_one_thread_and_two(
    folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text.write_text(TEXT * 40)
    words = ("real_coding", "measure", "--model", str(folder), "--text", f"cats={text}", "--kilobytes", "1")
    assert experiment(monkeypatch, *words) == 0
    table = pd.read_csv("results/real/real_coding.csv")
    assert list(table["coder"]) == ["xz -9e", "bzip2 -9", "zstd -22", "brotli -11", folder.name]
    row = table.iloc[-1]
    assert row["bytes"] == len(TEXT.encode()) * (1000 // len(TEXT.encode())) and row["decoded_with_threads"] == "1 2"
    assert row["model_bytes"] == sum(path.stat().st_size for path in real_coding.weight_files(folder))
    assert row["bits_per_byte_with_model"] == 8 * (row["coded_bytes"] + row["model_bytes"]) / row["bytes"]
    before = Path("results/real/real_coding.csv").read_bytes()
    assert experiment(monkeypatch, *words) == 0
    assert Path("results/real/real_coding.csv").read_bytes() == before
    assert experiment(monkeypatch, *words[:-2], "--speed", "--rounds", "1") == 0
    speeds = pd.read_csv("results/real/real_coding_speed.csv")
    assert len(speeds) == 10 and (speeds["seconds"] > 0).all()
    assert experiment(monkeypatch, "real_coding", "draw") == 0
    told = Path("results/real/real_coding.md").read_text()
    assert "on 1 and 2 threads: the same bytes" in told and Path("results/real/real_coding.png").is_file()


def test_the_coder_is_near_what_its_model_expects(folder: Path) -> None:
    coder = real_coding.load_text_model(folder)
    data = TEXT.encode() * 100
    tokens = coder.tokenizer.encode_bytes(data)
    num_rows = coder.num_rows(len(tokens))
    code = real_coding.encode_tokens(coder.model, tokens, coder.tokenizer.end_token, num_rows=num_rows)
    own = real_coding.cross_entropy_bits(coder, tokens)
    assert num_rows > 2
    assert math.isclose(8 * len(code), own, rel_tol=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("real_embedding", "measure"), "--text : write NAME=FILE"),
        (("real_embedding", "measure", "--text", "cats"), "--text cats: write NAME=FILE"),
        (("real_coding", "measure", "--text", "cats=nowhere.txt"), "there is no text nowhere.txt"),
        (("real_coding", "measure", "--text", "cats=valid.txt", "--model", "nowhere"), "there is no nowhere"),
        (("real_coding", "draw", "nowhere"), "real_coding.csv is missing"),
    ],
)
def test_what_is_missing_is_one_line(
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    assert experiment(monkeypatch, *words) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
