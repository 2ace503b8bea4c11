"""Coded token files: the same tokens and batches as raw ones, a damaged file is built again, training is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from run_cases import TINY, call, write_corpus
from vocabfold import train
from vocabfold.coding.coders import CODERS
from vocabfold.data import batches as module
from vocabfold.data.batches import Batches
from vocabfold.data.token_file import (
    CODED_NAME,
    STORES,
    DamagedTokenFile,
    TokenFile,
    cached_token_file,
    open_token_file,
    write_token_file,
)
from vocabfold.errors import UserError
from vocabfold.tokens import token_counts

CODED = [store for store in STORES if store != "raw"]
VOCABULARY_SIZE = 5000


def documents(count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 400, count)
    return (generator.zipf(1.3, lengths.sum()) % VOCABULARY_SIZE).astype(np.int64), lengths


def written(folder: Path, store: str) -> TokenFile:
    return write_token_file(folder, [documents()], VOCABULARY_SIZE, {} if store == "raw" else {"store": store})


@pytest.mark.parametrize("store", CODED)
def test_a_coded_file_reads_like_an_array(tmp_path: Path, store: str) -> None:
    expected, lengths = documents()
    tokens = written(tmp_path / "f", store)
    assert len(tokens) == len(tokens.tokens) == len(expected) and tokens.num_documents == len(lengths)
    for part in (
        slice(None),
        slice(5, 4100),
        slice(4096, 8192),
        slice(9000, None),
        slice(7, 7),
        slice(9, 3),
        slice(-3, None),
    ):
        assert np.array_equal(tokens.tokens[part], expected[part])
    places = np.random.default_rng(1).integers(0, len(expected), (5, 7))
    assert np.array_equal(tokens.tokens[places], expected[places])
    assert torch.equal(token_counts(tokens.tokens, VOCABULARY_SIZE), token_counts(expected, VOCABULARY_SIZE))
    assert not (tmp_path / "f" / "tokens.bin").exists()
    if store in ("huffman", "rans"):
        assert (tmp_path / "f" / CODED_NAME).stat().st_size < 2 * len(expected)


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the coders that decode segments side by side take fewer steps."""
    for store in CODED:
        monkeypatch.setattr(CODERS[store], "segment_tokens", 128)


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("store", CODED)
def test_batches_are_the_same_whatever_the_store(
    tmp_path: Path, store: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STRETCH_BATCHES", 3)
    settings: dict[str, Any] = {"sequence_length": 50, "batch_size": 6, "seed": 3, "layout": layout, "end_token": 1}
    for world_size in (1, 2):
        for rank in range(world_size):
            ranks = {"rank": rank, "world_size": world_size}
            raw = Batches(written(tmp_path / "raw", "raw"), **settings, **ranks)
            coded = Batches(written(tmp_path / store, store), **settings, **ranks)
            # over the ends of epochs and stretches, and as a run that resumes asks
            for index in [*range(2 * raw.batches_per_epoch + 2), 3, 100, 7]:
                for one, other in zip(raw.batch(index), coded.batch(index), strict=True):
                    assert torch.equal(one, other)
            pairs = zip(raw.evaluation_batches(), coded.evaluation_batches(), strict=True)
            assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def test_a_damaged_coded_file_is_told_and_built_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def build(folder: Path, key: dict[str, Any]) -> TokenFile:
        return write_token_file(folder, [documents()], VOCABULARY_SIZE, key)

    built = cached_token_file(tmp_path, "f", {"store": "rans"}, build)
    path = built.folder / CODED_NAME
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedTokenFile, match="fails its checksum"):
        open_token_file(built.folder)
    again = cached_token_file(tmp_path, "f", {"store": "rans"}, build)
    assert np.array_equal(again.tokens[:], documents()[0])
    assert "building it again" in capfd.readouterr().err


def test_training_is_the_same_and_so_is_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path)
    losses = []
    for store in ("raw", "rans"):
        settings = (f"data.store={store}", f"run_dir={store}", "budget.steps=6", "log_every=1")
        assert call(train.main, monkeypatch, *TINY, *settings) == 0
        lines = [json.loads(line) for line in (tmp_path / store / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["train_loss"] for line in lines] + [lines[-1]["validation_loss_nats"]])
    assert losses[0] == losses[1] and len(losses[0]) == 7
    assert len(list((tmp_path / "cache").glob("*/" + CODED_NAME))) == 2


def test_an_unknown_store_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    assert call(train.main, monkeypatch, *TINY, "data.store=zip", "run_dir=run") == 2
    assert "data.store is 'zip': choose one of raw, bitpack, huffman, rans, zstd" in capfd.readouterr().err


def test_a_store_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    from vocabfold.coding.store import StoredTokens

    written(tmp_path / "f", "rans")
    with pytest.raises(UserError, match="a vocabulary of 5000, not 6000"):
        StoredTokens(tmp_path / "f" / CODED_NAME, 6000)
