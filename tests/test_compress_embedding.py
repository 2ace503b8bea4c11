"""Compression of finished runs: new run folders that load, generate, resume and stand in the table beside the old."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from run_cases import TINY, call, write_corpus
from vocabfold import compress_embedding, generate, train
from vocabfold.embeddings import relative_error
from vocabfold.errors import UserError
from vocabfold.runs.checkpoint import load_weights
from vocabfold.runs.load import load_run
from vocabfold.runs.record import collect, read_table
from vocabfold.runs.token_order import saved_embedding

RUNS = Path("results/runs/smoke/single")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run with a dense embedding of 50,257 x 16."""
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    assert call(train.main, monkeypatch, *TINY, "head=grouped", "budget.steps=6") == 0
    (folder,) = RUNS.iterdir()
    return folder


def rows_by_kind() -> dict[tuple[str, float], dict[str, Any]]:
    rows = [json.loads(path.read_text()) for path in RUNS.glob("*/row.json")]
    return {(row["embedding"], row["recovery_tokens"]): row for row in rows}


def test_every_kind_compresses_recovers_loads_and_is_listed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["embedding=int8", "embedding=int4 embedding.group_size=8", "embedding=low_rank embedding.rank=16"]
    kinds += ["embedding=tensor_train embedding.mode_sizes=[4,4] embedding.ranks=[2]", "embedding=tt_matrix"]
    arguments = [str(run), "--as", *kinds, "--recovery-share", "0", "0.5"]
    assert call(compress_embedding.main, monkeypatch, *arguments) == 0
    rows = rows_by_kind()
    base = rows["dense", None]
    assert len(rows) == 1 + 2 * len(kinds)
    half = round(0.5 * base["tokens"])
    for name in ("int8", "int4", "low_rank", "tensor_train", "tt_matrix"):
        assert (rows[name, 0]["steps"], rows[name, half]["steps"]) == (0, 3)
        assert rows[name, 0]["embedding_relative_error"] == rows[name, half]["embedding_relative_error"]
        assert rows[name, 0]["validation_loss_nats"] != rows[name, half]["validation_loss_nats"]
    # A low-rank form of full rank is the same model.
    assert rows["low_rank", 0]["validation_loss_nats"] == pytest.approx(base["validation_loss_nats"], abs=1e-5)
    assert rows["int8", 0]["embedding_bytes"] == 50_257 * 18
    assert base["model_bytes"] - rows["int8", 0]["model_bytes"] == 50_257 * (64 - 18)
    assert (
        len(read_table("single", "smoke").pipe(lambda table: table[table["embedding"].notna()])) == len(rows)
        if (collect("single", "smoke").is_file())
        else False
    )

    table = load_run(run, torch.device("cpu")).backbone.token_embedding.rows(0, 50_257)
    for folder in RUNS.glob("*compressed*"):
        row = json.loads((folder / "row.json").read_text())
        model = load_run(folder, torch.device("cpu"))
        weights = (folder / "model.safetensors").stat().st_size
        assert weights == pytest.approx(row["model_bytes"], rel=0.02)
        if row["steps"] == 0:
            error = relative_error(model.backbone.token_embedding, table)
            assert error == pytest.approx(row["embedding_relative_error"], rel=1e-3, abs=1e-6)
        assert call(generate.main, monkeypatch, str(folder), "the cat", "--max-tokens", "2") == 0
        with pytest.raises(UserError, match="compressed input embedding"):
            saved_embedding(folder, 50_257)
    before = {path: path.stat().st_mtime_ns for path in RUNS.glob("*/row.json")}
    assert call(compress_embedding.main, monkeypatch, *arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in RUNS.glob("*/row.json")} == before


def test_a_scratch_run_of_every_kind_keeps_its_small_form(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensor_train", "tt_matrix", "int8"):
        extra = ["embedding.compression=2"] if name == "tensor_train" else []
        assert call(train.main, monkeypatch, *TINY, "head=grouped", f"embedding={name}", *extra) == 0
    for name, least in (("tensor_train", 2.0), ("tt_matrix", 4.0), ("int8", 3.5)):
        (folder,) = RUNS.glob(f"gpt2-grouped-{name}-text-*")
        row = json.loads((folder / "row.json").read_text())
        assert row["embedding"] == name and row["embedding_compression"] >= least and row["recovery_tokens"] is None
        load_run(folder, torch.device("cpu"))


def test_what_cannot_be_compressed_is_refused_in_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(train.main, monkeypatch, *TINY, "head=full") == 0
    (tied,) = RUNS.glob("gpt2-full-*")
    assert call(compress_embedding.main, monkeypatch, str(run), "--as", "embedding=int8") == 0
    (small,) = RUNS.glob("*int8*")
    cases = [
        ([str(tied), "--as", "embedding=int8"], "has no rows to lend to the head"),
        ([str(small), "--as", "embedding=int8"], "has no dense embedding"),
        (["nowhere", "--as", "embedding=int8"], "holds no config.yaml"),
        ([str(run), "--as", "embedding=int9"], "there is no embedding=int9"),
        ([str(run), "--as", "head=full"], "write embedding=NAME"),
        ([str(run), "--as", "embedding=low_rank embedding.rnak=3"], "did you mean embedding.rank?"),
        ([str(run), "--as", "embedding=tensor_train embedding.compression=40"], "out of reach"),
        ([str(run), "--as", "embedding=int8", "--recovery-share", "1.5"], "choose numbers from 0 to 1"),
        ([str(run)], "required: --as"),
    ]
    capfd.readouterr()
    folders = set(RUNS.iterdir())
    for arguments, words in cases:
        assert call(compress_embedding.main, monkeypatch, *arguments) == 2
        written = capfd.readouterr().err
        assert words in written and "Traceback" not in written and written.count("\n") == 1, written
    assert set(RUNS.iterdir()) == folders


def test_weights_of_another_shape_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_run(run, torch.device("cpu"))
    model.backbone.token_embedding = type(model.backbone.token_embedding)(50_257, 8)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_weights(run, model)
