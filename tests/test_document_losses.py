"""Losses by document of tiny finished runs: they add up, by hand for one document, and other texts are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from experiments.paper import document_losses

from run_cases import TEXT, TINY, call, experiment, write_corpus
from vocabfold import train
from vocabfold.data.batches import BatchPlan
from vocabfold.data.corpora import load_corpus
from vocabfold.runs.load import load_run
from vocabfold.runs.settings import load_settings
from vocabfold.tokens import IGNORE_INDEX


def measure(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    return experiment(monkeypatch, "document_losses", "measure", *arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of main_comparison on a tiny text, full and paper, on 4 validation documents."""
    folder = tmp_path_factory.mktemp("documents")
    write_corpus(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("VOCABFOLD_CACHE", str(folder / "cache"))
        for head in ("full", "paper"):
            assert call(train.main, patch, *TINY, "experiment=main_comparison", f"head={head}") == 0
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of their folder, and in it."""
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(folder / "cache"))
    return folder


def test_documents_add_up_to_the_loss_of_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure(monkeypatch, *TEXT) == 0
    table = pd.read_csv(here / "results" / "text" / "document_losses.csv")
    assert sorted(table["head"].unique()) == ["full", "paper"]
    runs = [
        json.loads(path.read_text()) for path in (here / "results" / "runs").glob("text/main_comparison/*/row.json")
    ]
    for run in runs:
        rows = table[table["head"] == run["head"]]
        assert rows["document"].tolist() == [0, 1, 2, 3]
        assert rows["loss_nats"].sum() / rows["tokens"].sum() == pytest.approx(run["validation_loss_nats"], abs=1e-4)
    tokens = table.pivot(index="document", columns="head", values="tokens")
    assert (tokens["full"] == tokens["paper"]).all()


def test_a_document_by_hand(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure(monkeypatch, *TEXT) == 0
    table = pd.read_csv(here / "results" / "text" / "document_losses.csv")
    (folder,) = (here / "results" / "runs" / "text" / "main_comparison").glob("*-full-*")
    settings = load_settings(folder)
    corpus, model = load_corpus(settings.data), load_run(folder, torch.device("cpu"))
    sums = np.zeros(4)
    document = 0  # the end token that closes a document still belongs to it
    for inputs, targets in corpus.batches("valid", BatchPlan(16, 1, seed=0)).evaluation_batches():
        log_prob = model.head.log_prob(model.backbone(inputs)[0])
        for row, target in zip(log_prob, targets[0].tolist(), strict=True):
            if target == IGNORE_INDEX:
                continue
            sums[document] -= float(row[target].detach())
            document += target == corpus.end_token
    measured = table[table["head"] == "full"].sort_values("document")["loss_nats"].to_numpy()
    assert measured == pytest.approx(sums, abs=1e-2)


def test_a_run_that_reported_another_loss_is_told_in_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = next((here / "results" / "runs" / "text" / "main_comparison").glob("*/row.json"))
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"validation_loss_nats": row["validation_loss_nats"] + 0.001}))
    assert measure(monkeypatch, *TEXT) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line and "|" not in line]
    assert len(lines) == 1 and "train the run again" in lines[0]
    assert not (here / "results" / "text" / "document_losses.csv").exists()


def test_runs_on_other_positions_are_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = (here / "valid.txt").read_text(encoding="utf-8")
    (here / "longer.txt").write_text(text + " and then home", encoding="utf-8")
    arguments = [*TINY, "experiment=main_comparison", "head=full", "seed=1", "data.valid=longer.txt"]
    assert call(train.main, monkeypatch, *arguments) == 0
    capfd.readouterr()
    assert measure(monkeypatch, *TEXT) == 2
    assert "other positions" in capfd.readouterr().err
    assert not (here / "results" / "text" / "document_losses.csv").exists()


def test_nothing_to_measure_is_told_in_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert measure(monkeypatch) == 2
    assert "holds no finished run" in capfd.readouterr().err


def test_neighbours_of_a_long_text_are_taken_together() -> None:
    class Valid:
        num_documents = 2500
        document_starts = np.arange(0, 25_001, 10)

    class Text:
        valid = Valid

    documents = document_losses.documents_of(Text, np.arange(1, 25_000))  # type: ignore[arg-type]
    assert len(np.unique(documents)) == 834 and set(np.unique(documents) % 3) == {0}
    assert documents[:30].tolist() == [0] * 29 + [3]
