"""Settings are chosen on held-out training documents: the split, the table of learning rates, the curves of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from run_cases import TINY, call, write_corpus
from vocabfold import train
from vocabfold.data.token_file import TokenFile
from vocabfold.errors import UserError
from vocabfold.runs.compose import composed
from vocabfold.runs.record import collect
from vocabfold.runs.settings import chosen_learning_rate
from vocabfold.runs.tables import IDENTITY_COLUMNS, ORIGIN_COLUMNS, RUN_COLUMNS, write_table


def token_file(*lengths: int) -> TokenFile:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)
    return TokenFile(np.arange(starts[-1], dtype=np.uint16), starts, 100, Path("none"))


@pytest.mark.parametrize(("share", "documents_after"), [(0.1, 1), (0.3, 1), (0.31, 2), (0.5, 2), (0.8, 3)])
def test_a_split_holds_out_whole_last_documents(share: float, documents_after: int) -> None:
    whole = token_file(2, 3, 2, 3)
    before, after = whole.split(share)
    assert after.num_documents == documents_after and before.num_documents == 4 - documents_after
    assert len(after) >= share * len(whole)
    assert before.tokens.tolist() + after.tokens.tolist() == whole.tokens.tolist()
    lengths = [*np.diff(before.document_starts), *np.diff(after.document_starts)]
    assert lengths == [2, 3, 2, 3] and before.document_starts[0] == after.document_starts[0] == 0


def test_a_single_document_is_cut_within() -> None:
    before, after = token_file(10).split(0.25)
    assert (len(before), len(after)) == (7, 3)
    assert before.document_starts.tolist() == [0, 7] and after.document_starts.tolist() == [0, 3]


def test_a_split_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="leaves nothing on one side"):
        token_file(2, 8).split(0.9)


def test_development_documents_are_neither_trained_on_nor_the_validation_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    taken: list[Any] = []
    monkeypatch.setattr(train, "Trainer", lambda settings, corpus, *_: taken.append(corpus) or pytest.skip())
    (tmp_path / "valid.txt").write_text("never read", encoding="utf-8")
    for share in ("0.0", "0.25"):
        with pytest.raises(pytest.skip.Exception):
            call(train.main, monkeypatch, *TINY, f"development_share={share}")
    whole, split = taken
    assert split.train.tokens.tolist() + split.valid.tokens.tolist() == whole.train.tokens.tolist()
    assert len(split.valid) >= 0.25 * len(whole.train) and len(whole.valid) < 10


def test_the_first_tokens_end_within_a_document() -> None:
    first = token_file(4, 3, 2).first(5)
    assert first.tokens.tolist() == token_file(4, 3, 2).tokens[:5].tolist()
    assert first.document_starts.tolist() == [0, 4, 5]
    assert token_file(4, 3).first(4).document_starts.tolist() == [0, 4]


@pytest.mark.parametrize("wanted", [0, 8])
def test_first_tokens_that_are_not_there_are_refused(wanted: int) -> None:
    with pytest.raises(UserError, match=f"{wanted} tokens of 7: choose at least 1"):
        token_file(4, 3).first(wanted)


def test_training_sees_only_the_first_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    taken: list[Any] = []
    monkeypatch.setattr(train, "Trainer", lambda settings, corpus, *_: taken.append(corpus) or pytest.skip())
    (tmp_path / "valid.txt").write_text("read whole, whatever is trained on", encoding="utf-8")
    for words in ([], ["training_tokens=6"], ["training_tokens=6", "development_share=0.25"]):
        with pytest.raises(pytest.skip.Exception):
            call(train.main, monkeypatch, *TINY, *words)
    whole, short, developed = taken
    assert short.train.tokens.tolist() == developed.train.tokens.tolist() == whole.train.tokens[:6].tolist()
    assert short.valid.tokens.tolist() == whole.valid.tokens.tolist()
    assert developed.valid.tokens.tolist() == whole.train.tokens[-len(developed.valid) :].tolist()


def rates_row(head: str, rate: float, seed: int, loss: float) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(RUN_COLUMNS + ORIGIN_COLUMNS, "x")
    row |= {"learning_rate": rate, "seed": seed, "validation_loss_nats": loss, "head": head}
    row |= {"run": f"{head}-{rate}-{seed}", "corpus_documents": 20, "corpus_tokens": 1000}
    return row | {"group_size": 2, "num_groups": 2, "shortlist": 0, "scorer": head}


def test_the_rate_with_the_least_mean_loss_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [rates_row("a", 1e-3, 0, 3.0), rates_row("a", 2e-3, 0, 2.0), rates_row("a", 2e-3, 1, 2.8)]
    rows += [rates_row("a", 4e-3, 0, 1.9), rates_row("a", 4e-3, 1, 3.0), rates_row("b", 8e-3, 0, 1.0)]
    write_table(pd.DataFrame(rows), Path("results/text/learning_rates.csv"))
    assert chosen_learning_rate("text", "a") == 2e-3 and chosen_learning_rate("text", "b") == 8e-3
    config = composed(["experiment=heads_pareto", "data=text", "head=full_untied"])
    with pytest.raises(Exception, match="has no full_untied"):
        _ = config.optimizer.learning_rate


def test_a_missing_table_of_rates_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(train.main, monkeypatch, "experiment=order_matters", "head=scale_shift_bpe") == 2
    written = capfd.readouterr().err
    assert written.count("\n") == 1 and "learning_rates.csv is missing" in written


@pytest.mark.parametrize("evaluations", [1, 2])
def test_curves_are_collected_from_runs_that_are_evaluated_on_their_way(tmp_path: Path, evaluations: int) -> None:
    for seed in (0, 1):
        folder = tmp_path / "runs" / "stories" / "sweep" / f"run{seed}"
        folder.mkdir(parents=True)
        (folder / "row.json").write_text(json.dumps(rates_row("a", 1e-3, seed, 2.0)))
        lines = [{"step": 1, "train_loss": 9.0, "learning_rate": 5e-4, "peak_memory_gib": 1.0}]
        lines += [{"step": step, "train_loss": 8.0, "validation_loss_nats": 7.0} for step in range(2, 2 + evaluations)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    collect("sweep", "stories", tmp_path)
    path = tmp_path / "stories" / "sweep_curves.csv"
    assert path.is_file() == (evaluations > 1)
    if evaluations > 1:
        curves = pd.read_csv(path)
        assert len(curves) == 6 and curves["step"].tolist() == [1, 2, 3] * 2
        assert set(curves["learning_rate"]) == {1e-3}  # the run's own, not that of a step
        assert set(IDENTITY_COLUMNS) | {"train_loss"} <= set(curves.columns)
        assert "peak_memory_gib" not in curves.columns
