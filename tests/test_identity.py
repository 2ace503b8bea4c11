"""Which run a configuration is: what changes a result changes it, what does not leaves it, and a folder keeps to it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from run_cases import REPOSITORY, TINY, call, settings_of
from vocabfold import train
from vocabfold.data.content import content_sha256
from vocabfold.errors import UserError
from vocabfold.runs.compose import composed_settings
from vocabfold.runs.identity import run_of
from vocabfold.runs.record import collect
from vocabfold.runs.settings import load_settings

CONTENT = {"train": "a" * 64, "valid": "b" * 64}


@pytest.fixture(scope="module")
def tiny_run() -> str:
    """The run that the tiny settings are, as they stand."""
    return run_of(settings_of(), CONTENT)


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "batch_size=4",
        "precision=bf16",
        "budget.steps=3",
        "head.init_std=0.05",
        "optimizer.learning_rate=1e-4",
        "head=folded",
        "embedding=int8",
        "data.tokenizer=cl100k",
        "model.dropout=0.1",
        "development_share=0.1",
        "training_tokens=100",
    ],
)
def test_what_changes_a_result_makes_another_run(override: str, tiny_run: str) -> None:
    assert run_of(settings_of(override), CONTENT) != tiny_run


@pytest.mark.parametrize(
    "override",
    [
        "run_dir=X",
        "wandb.mode=offline",
        "log_every=1",
        "checkpoint_every=1",
        "checkpoint_minutes=1",
        "data.train=elsewhere.txt",
        "data.label=name",
        "data.workers=2",
        "data.store=zstd",
        "data.cache_dir=X",
    ],
)
def test_how_a_run_is_recorded_does_not(override: str, tiny_run: str) -> None:
    assert run_of(settings_of(override), CONTENT) == tiny_run


def test_the_content_of_the_text_decides_not_its_place(folder: Path) -> None:
    data = settings_of().data
    before = content_sha256(data)
    (folder / "train.txt").rename(folder / "moved.txt")
    assert content_sha256({**data, "train": "moved.txt"}) == before
    with (folder / "moved.txt").open("a") as file:
        file.write("a cat")
    after = content_sha256({**data, "train": "moved.txt"})
    assert after["train"] != before["train"] and after["valid"] == before["valid"]
    assert run_of(settings_of(), after) != run_of(settings_of(), before)


def test_stories_and_other_data_have_a_content_that_is_kept(folder: Path) -> None:
    for words in (["data=stories", "data.num_train_documents=3"], ["data=zipf"], ["data=shapes", "model=cnn"]):
        data = composed_settings(words).data
        assert content_sha256(data) == content_sha256(data)
    assert (
        content_sha256(composed_settings(["data=stories", "data.num_train_documents=3"]).data)["train"]
        != (content_sha256(composed_settings(["data=stories", "data.num_train_documents=4"]).data)["train"])
    )
    assert list((folder / "cache").glob("content-*.sha256"))


def test_two_runs_that_differ_in_one_setting_both_stand_in_the_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (
        [],
        ["batch_size=3"],
        ["head.init_std=0.05", "head.tied=false"],
        ["precision=bf16"],
        ["budget.steps=1"],
    ):
        assert call(train.main, monkeypatch, *TINY, *words) == 0
    table = pd.read_csv(collect("single", "text"))
    assert len(table) == 5 and table["run"].nunique() == 5
    assert table["corpus_sha256"].nunique() == 1 and (table["corpus_documents"] == 20).all()
    first = next(folder.glob("results/runs/text/single/*/row.json"))
    first.unlink()  # as on a machine that did not train this run: its row stays
    assert pd.read_csv(collect("single", "text")).equals(table)


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_belongs_to_one_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], finished: bool
) -> None:
    assert call(train.main, monkeypatch, *TINY, "run_dir=X") == 0
    if not finished:
        (folder / "X" / "row.json").unlink()
    config = (folder / "X" / "config.yaml").read_text()
    capfd.readouterr()
    assert call(train.main, monkeypatch, *TINY, "run_dir=X", "seed=5") == 2
    written = capfd.readouterr().err
    assert "X holds another run (its seed is 0, here it is 5)" in written and written.count("\n") == 1
    with (folder / "train.txt").open("a") as file:
        file.write("a cat")
    assert call(train.main, monkeypatch, *TINY, "run_dir=X") == 2
    assert "X holds another run (its text had another content)" in capfd.readouterr().err
    assert (folder / "X" / "config.yaml").read_text() == config
    # without a folder of its own the changed text is a run of its own
    assert call(train.main, monkeypatch, *TINY) == 0
    assert call(train.main, monkeypatch, *TINY) == 0
    assert len(list(folder.glob("results/runs/text/single/*/row.json"))) == 1


def test_a_received_configuration_reads_nothing_of_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hidden words")
    assert call(train.main, monkeypatch, *TINY, "run_dir=X") == 0
    path = folder / "X" / "config.yaml"
    content = yaml.safe_load(path.read_text())
    content["data"]["label"] = "${oc.env:SECRET_TOKEN}"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="which no run writes") as caught:
        load_settings(folder / "X")
    assert "hidden words" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_committed_run_has_the_identity_that_its_command_has_today(folder: Path) -> None:
    """Repeating a command of a committed table finds the run, whose text the table names by its SHA-256."""
    table = pd.read_csv(REPOSITORY / "results" / "zipf" / "vocabulary_scaling.csv")
    row = table[(table["head"] == "full_untied") & (table["vocabulary_size"] == 10_000)].iloc[0]
    words = ["experiment=vocabulary_scaling", "head=full_untied", "data.vocabulary_size=10000"]
    words += [f"seed={row['seed']}", f"optimizer.learning_rate={row['learning_rate']}"]
    settings = composed_settings(words)
    content = content_sha256(settings.data)
    assert content["train"] == row["corpus_sha256"]
    assert run_of(settings, content) == row["run"]
