"""Experiments on finished models, on a tiny one: what stands is not measured again, and tables say what they must."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from experiments.judging import Story
from experiments.real import real_caching, real_coding, real_embedding, real_stories
from experiments.real.coding_words import is_deflated
from experiments.real.real_embedding import Way
from experiments.study import by_document
from experiments.tokens.caching_speed import Workload

from run_cases import TEXT as CORPUS
from run_cases import TINY, call, experiment, write_corpus
from test_hugging_face_coding import TEXT, folder
from vocabfold import train
from vocabfold.hugging_face import load
from vocabfold.inference.text_file import decompress

__all__ = ["folder"]  # a fixture
DOCUMENTS = ["the cat sat on that mat\nand ate\n", "a hat that the rat had\n", "at that the cat sat\n"]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "valid.txt"
    path.write_text("<|endoftext|>\n".join(DOCUMENTS * 2))
    return path


def test_embeddings_are_compared_and_not_twice(folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("real_embedding", "measure", "--model", str(folder), "--text", f"cats={text}", "--documents", "5")
    assert experiment(monkeypatch, *words, "--only", "dense", "int8") == 0
    path = Path("results/real/real_embedding.csv")
    first = pd.read_csv(path)
    assert list(first["embedding"]) == ["dense", "int8", "int8"]  # the untied model has no rows with both sides
    assert experiment(monkeypatch, *words) == 0
    table = pd.read_csv(path)
    pd.testing.assert_frame_equal(table.iloc[:3][first.columns], first, check_dtype=False)
    assert {"int4", "mixed", "low_rank", "tt_matrix", "tensor_train"} < set(table["embedding"])
    assert (table["documents"] == 5).all() and table["run"].is_unique
    losses = table["document_loss_nats"].map(lambda cell: by_document.numbers_in(cell).sum())
    np.testing.assert_allclose(losses / table["tokens"], table["loss_nats"], atol=1e-4)
    half = table[(table["numbers"] == "bfloat16") & (table["embedding"] == "low_rank")].iloc[0]
    assert half["compression"] >= half["wanted_compression"]
    before = path.read_bytes()
    assert experiment(monkeypatch, *words) == 0
    assert path.read_bytes() == before
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

    def decoded_here(coded: Path, model: Path, threads: int) -> bytes:  # test_hugging_face_coding has other processes
        decompress(coded, back := coded.with_suffix(f".{threads}"), real_coding.load_text_model(model), lambda *_: None)
        return back.read_bytes()

    monkeypatch.setattr(real_coding, "decoded_elsewhere", decoded_here)
    words = ("real_coding", "measure", "--model", str(folder), "--text", f"cats={text}", "--kilobytes", "1")
    assert experiment(monkeypatch, *words) == 0
    table = pd.read_csv("results/real/real_coding.csv")
    general = ["xz -9e", "bzip2 -9", "zstd -22", "brotli -11"]
    assert list(table["coder"]) == [*general, folder.name]
    assert (table["whole_bytes"].iloc[:4] == len((TEXT * 40).encode())).all() and pd.isna(table["whole_bytes"].iloc[4])
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
    assert "our own small models" not in told


def test_texts_are_coded_by_small_models_of_ours_too(
    folder: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text.write_text("the cat sat on that mat and ate\n" * 40)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path)
    assert call(train.main, monkeypatch, *TINY, "head=full", "run_dir=small") == 0

    def decoded_here(coded: Path, model: Path, threads: int) -> bytes:
        decompress(coded, back := coded.with_suffix(f".{threads}"), real_coding.load_text_model(model), lambda *_: None)
        return back.read_bytes()

    monkeypatch.setattr(real_coding, "decoded_elsewhere", decoded_here)
    words = ("real_coding", "measure", "--model", str(folder), "--text", f"cats={text}", "--kilobytes", "1")
    assert experiment(monkeypatch, *words) == 0
    before = pd.read_csv("results/real/real_coding.csv")
    assert experiment(monkeypatch, *words, "--run", "small") == 0
    table = pd.read_csv("results/real/real_coding.csv")
    pd.testing.assert_frame_equal(table.iloc[:5][before.columns], before, check_dtype=False)
    row = table.iloc[5]
    assert len(table) == 6 and row["coder"].startswith("ours: full, ") and row["decoded_with_threads"] == "1 2"
    assert row["model_bytes"] == Path("small/model.safetensors").stat().st_size
    assert 0 < row["own_bits_per_byte"] < 8
    assert experiment(monkeypatch, *words[:-2], "--run", "small", "--speed", "--rounds", "1") == 0
    speeds = pd.read_csv("results/real/real_coding_speed.csv")
    assert len(speeds) == 12 and row["coder"] in set(speeds["coder"])
    assert experiment(monkeypatch, "real_coding", "draw") == 0
    told = Path("results/real/real_coding.md").read_text()
    assert "our own small models" in told
    assert ("(deflated" in told) == bool((table["bits_per_byte"] < table["own_bits_per_byte"]).any())
    assert is_deflated(row.where(row.index != "own_bits_per_byte", row["bits_per_byte"] + 0.1))
    assert not is_deflated(row.where(row.index != "own_bits_per_byte", row["bits_per_byte"] - 0.1))
    assert experiment(monkeypatch, *words, "--run", "nowhere") == 2
    assert "nowhere holds no finished run" in capsys.readouterr().err


def test_the_coder_is_near_what_its_model_expects(folder: Path) -> None:
    coder = real_coding.load_text_model(folder)
    data = TEXT.encode() * 100
    tokens = coder.tokenizer.encode_bytes(data)
    num_rows = coder.num_rows(len(tokens))
    code = real_coding.encode_tokens(coder.model, tokens, coder.tokenizer.end_token, num_rows=num_rows)
    own = real_coding.cross_entropy_bits(coder, tokens)
    assert num_rows > 2
    assert own < 8 * len(code) < 1.02 * own


def test_stories_of_runs_and_references_are_weighed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path)
    assert call(train.main, monkeypatch, *TINY, "head=full", "run_dir=writer") == 0
    words = ("real_stories", "measure", "--model", str(folder), "--beginnings", "3", "--max-tokens", "5")
    assert experiment(monkeypatch, *words, *CORPUS) == 0
    path = Path("results/real/real_stories.csv")
    assert experiment(monkeypatch, "real_stories", "draw") == 0  # of references alone
    assert experiment(monkeypatch, *words, "--run", "writer") == 0
    table = pd.read_csv(path)
    assert list(table["writer"]) == [*real_stories.REFERENCES, "a run"] and (table["stories"] == 3).all()
    for _, row in table.iterrows():
        nats = np.array(row["story_nats"].split(), float)
        assert math.isclose(nats.sum() / row["tokens"], row["loss_nats"], rel_tol=1e-3)
    before = path.read_bytes()
    assert experiment(monkeypatch, *words, "--run", "writer") == 0
    assert path.read_bytes() == before
    assert experiment(monkeypatch, "real_stories", "draw") == 0
    told = path.with_suffix(".md").read_text()
    assert told.count("\n| ") == 4 and "a measure of quality puts" in told


def test_a_storys_loss_is_that_of_its_continuation_alone(folder: Path) -> None:
    model, tokenizer = load(folder)
    story = Story("the cat", " sat on that", ended=True)
    row = real_stories.story_losses(model, tokenizer, [story, Story("the", "", ended=True)])
    first, second = (tokenizer(part, add_special_tokens=False).input_ids for part in ("the cat", " sat on that"))
    ids = torch.tensor([first + second])
    with torch.no_grad():
        log_prob = model(ids).logits[0].log_softmax(-1)
    expected = -sum(float(log_prob[len(first) - 1 + place, token]) for place, token in enumerate(second))
    assert math.isclose(row["nats"][0], expected, rel_tol=1e-5)
    assert list(row["tokens"]) == [len(second), 0] and list(row["bytes"]) == [12, 0] and row["nats"][1] == 0


@pytest.mark.slow
def test_caches_are_compared_on_a_finished_model(
    folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text.write_text("<|endoftext|>\n".join(DOCUMENTS * 4))
    small = [Workload("distinct", 5, 0, 2), Workload("distinct", 12, 0, 2)]
    small += [Workload("repeated", 12, 12, 2, real_caching.REUSE), Workload("shared beginning", 14, 10, 1)]
    small.append(Workload("new tokens alone", 4, 0, 1, ("key/value",)))
    monkeypatch.setattr(real_caching, "WORKLOADS", small)
    keys = [(one.name, one.prompt_tokens, one.new_tokens) for one in small]
    for name, key in zip(("SHORT", "LONG", "REPEATED", "SHARED", "ALONE"), keys, strict=True):
        monkeypatch.setattr(real_caching, name, key)
    unseen = Workload("distinct", 12, 0, 2)
    monkeypatch.setattr(real_caching, "MEMORY_WORKLOADS", (unseen, small[2]))
    threads = torch.get_num_threads()
    words = ("real_caching", "measure", "--model", str(folder), "--text", f"cats={text}", "--rounds", "2")
    try:
        assert experiment(monkeypatch, *words, "--threads", str(threads)) == 0
    finally:
        torch.set_num_threads(threads)
    table = pd.read_csv("results/real/real_caching.csv", keep_default_na=False)
    exact = table[~table["cache"].isin(["bf16", "int8", "int4", "all coded"])]
    assert (exact["same_tokens_share"] == 1).all() and set(table["library"]) == {"vocabfold", "transformers"}
    kinds = pd.read_csv("results/real/real_caching_perplexity.csv").set_index("key_values")
    assert (kinds["loss_nats"] - kinds["loss_nats"]["exact"]).abs().max() < 0.2
    assert kinds["bytes_a_position"]["int8"] < 0.6 * kinds["bytes_a_position"]["bf16"]
    memory = pd.read_csv("results/real/real_caching_memory.csv", keep_default_na=False)
    above = memory["peak_memory_mib"].astype(float) - memory["weights_mib"].astype(float)
    assert (above[memory["workload"] == "distinct"] > 0).all() and (
        above >= 0
    ).all()  # a stored answer computes nothing
    assert experiment(monkeypatch, *words, "--threads", str(threads)) == 0
    assert capsys.readouterr().out.count("measured before") == 3
    assert experiment(monkeypatch, "real_caching", "draw") == 0
    told = Path("results/real/real_caching.md").read_text()
    assert "25% faster than no cache, unseen prompts of 12" in told and "30% less peak memory" in told
    assert Path("results/real/real_caching.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("real_embedding", "measure"), "--text : write NAME=FILE"),
        (("real_embedding", "measure", "--text", "cats"), "--text cats: write NAME=FILE"),
        (("real_coding", "measure", "--text", "cats=nowhere.txt"), "there is no text nowhere.txt"),
        (("real_coding", "measure", "--text", "cats=valid.txt", "--model", "nowhere"), "there is no nowhere"),
        (("real_coding", "draw", "nowhere"), "real_coding.csv is missing"),
        (
            ("real_caching", "measure", "--text", "a=valid.txt", "--text", "b=valid.txt"),
            "the prompts come from one text",
        ),
        (("real_stories", "measure", "--beginnings", "0"), "--beginnings is 0"),
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
