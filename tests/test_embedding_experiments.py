"""The programs that measure embeddings, each on something tiny."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from experiments.embeddings import embedding_published, embedding_tables
from safetensors.torch import save_file

from run_cases import experiment
from test_published_weights import write_architecture
from vocabfold.embeddings import build_embedding
from vocabfold.runs.compose import composed, composed_settings


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))


def test_published_weights_are_compressed_and_their_perplexity_measured(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedding_published, "COMPRESSIONS", (2.0,))
    write_architecture(Path("gpt2"), "gpt2")
    sizes = ("data.num_topics=4", "data.num_train_tokens=400", "data.num_valid_tokens=200")
    data = ("data=zipf", "data.vocabulary_size=13", *sizes)
    assert experiment(monkeypatch, "embedding_published", "measure", "gpt2", *data, "--batch-size", "2") == 0, (
        capfd.readouterr().err
    )
    table = pd.read_csv("results/zipf/embedding_published.csv")
    dense = table[table["embedding"] == "dense"].iloc[0]
    assert dense["relative_error"] == 0 and set(table["place"]) == {"input", "both"}
    int8 = table[table["embedding"] == "int8"]
    assert len(int8) == 2 and int8["perplexity"].to_numpy() == pytest.approx(dense["perplexity"], rel=0.05)
    assert (int8["perplexity"] != dense["perplexity"]).all()
    assert {"tensor_train", "low_rank"} <= set(table["embedding"])
    data = ("data=zipf", "data.vocabulary_size=14", *sizes)
    assert experiment(monkeypatch, "embedding_published", "measure", "gpt2", *data) == 2
    assert "has 14 tokens" in capfd.readouterr().err


def test_tables_are_measured_and_drawn(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(embedding_tables, "COMPRESSIONS", (3.31,))
    monkeypatch.setattr(embedding_tables, "GAUSSIAN_SIZE", 32)
    monkeypatch.setattr(embedding_tables, "MINILM_PACKAGE", "none")  # large
    Path("run").mkdir()
    table = torch.randn(300, 4) @ torch.randn(4, 32)
    save_file({"backbone.token_embedding.weight": table}, "run/model.safetensors")
    assert experiment(monkeypatch, "embedding_tables", "measure", "--rows", "100", "--run", "run") == 0, (
        capfd.readouterr().err
    )
    rows = pd.read_csv("results/stories/embedding_tables.csv")
    low = rows[(rows["embedding"] == "low_rank") & (rows["wanted_compression"] == 3.31)].set_index("table")
    assert low.loc["run run", "relative_error"] < 1e-5 < low.loc["run run, shuffled", "relative_error"]
    assert {"Gaussian", "run run", "run run, shuffled"} <= set(rows["table"])
    assert experiment(monkeypatch, "embedding_tables", "draw", "stories") == 0
    assert Path("results/stories/embedding_tables.png").is_file()
    assert experiment(monkeypatch, "embedding_tables", "measure", "--run", "nowhere") == 2
    assert "name the folder of a finished run" in capfd.readouterr().err


def test_every_compression_of_the_sweep_can_be_built() -> None:
    options = ["experiment=embedding_compressed", "start.run=run"]
    forms: set[str] = set()
    for data in ("stories", "tinystories"):
        swept = composed([*options, f"data={data}"], with_hydra=True).hydra.sweeper.params["embedding"]
        forms |= set(found := re.findall(r"\{.*?\}", swept))
        assert len(found) > 5
    for form in sorted(forms):
        settings = composed_settings([*options, f"embedding={form}"])
        assert (settings.start.type, settings.experiment) == ("compress", "embedding_compression")
        build_embedding(settings.embedding, 50_257, 64)
