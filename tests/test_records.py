"""What a run leaves behind: whole files or none, the agreed columns, and state that executes nothing."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from run_cases import REPOSITORY, settings_of
from vocabfold.errors import UserError
from vocabfold.files import replacing, write_text
from vocabfold.runs.checkpoint import CHECKPOINT_NAME, load_checkpoint, load_weights, save_checkpoint, save_weights
from vocabfold.runs.record import (
    RunRecord,
    beside_others,
    collect,
    finished_row,
    finished_runs,
    read_metrics,
)
from vocabfold.runs.settings import CONFIG_FOLDER, load_settings
from vocabfold.runs.tables import ORIGIN_COLUMNS, RUN_COLUMNS, read_rows, read_table, write_table

CPU = torch.device("cpu")
RESULTS = REPOSITORY / "results"
# What tells the rows of one run apart in the tables that look closer at runs.
KEYS = {
    "lead_by_step": ("run", "full_run"),
    "rare_tokens": ("run", "sorted_by", "class"),
    "table1_story_quality": ("run", "writer", "judge"),
}
EXPERIMENTS = [path.stem for path in (CONFIG_FOLDER / "experiment").glob("*.yaml")]
TIMED = ("caching", "decode")  # experiments whose table is of another kind
COMMITTED = sorted(path for path in RESULTS.glob("*/*.csv") if path.stem in {*EXPERIMENTS, *KEYS} - {*TIMED})


def row_of(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(RUN_COLUMNS + ORIGIN_COLUMNS, "x")
    row |= {"group_size": 225, "num_groups": 224, "shortlist": None, "seed": 0, "validation_loss_nats": 2.0}
    row |= {"corpus_documents": 20, "corpus_tokens": 1000, "learning_rate": 0.002}
    return {"extra_nats": 1.0, **row, **changes}


def small_state() -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_resumed_record_drops_later_steps_and_a_half_written_line(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "train_loss": 1.0 / step}) for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "tra')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    record = RunRecord(tmp_path, settings_of(), resume_step=3)
    record.log(4, {"train_loss": 0.5})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]  # a reader sees it before the run ends
    assert finished_row(tmp_path) is None
    record.finish({"seed": 0})
    assert finished_row(tmp_path) == {"seed": 0}
    assert read_metrics(tmp_path)[-1] == {"step": 4, "train_loss": 0.5}
    assert load_settings(tmp_path) == settings_of()


def test_a_record_mirrors_to_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_DIR", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    record = RunRecord(tmp_path / "run", settings_of("wandb.mode=offline"), resume_step=0)
    record.log(1, {"train_loss": 1.0})
    record.finish({"seed": 0})
    (mirror,) = (tmp_path / "run").rglob("*.wandb")
    assert mirror.stat().st_size > 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_tables_have_the_agreed_columns_and_of_one_run_in_two_folders_the_newer(tmp_path: Path) -> None:
    runs = tmp_path / "runs" / "stories" / "sweep"
    for age, (name, row) in enumerate(
        {
            "new": row_of(validation_loss_nats=1.0),
            "old": row_of(validation_loss_nats=3.0),
            "other_seed": row_of(run="y", seed=1),
        }.items()
    ):
        write_text(runs / name / "row.json", json.dumps(dict(reversed(row.items()))))
        os.utime(runs / name / "row.json", (1000 - age, 1000 - age))
    (runs / "unfinished").mkdir()
    assert [folder.name for folder, _ in finished_runs("sweep", "stories", tmp_path)] == ["other_seed", "new"]
    path = collect("sweep", "stories", tmp_path)
    assert path == tmp_path / "stories" / "sweep.csv"
    table = pd.read_csv(path)
    assert list(table.columns) == [*RUN_COLUMNS, "extra_nats", *ORIGIN_COLUMNS]
    assert table["seed"].tolist() == [0, 1]
    assert table["validation_loss_nats"].tolist() == [1.0, 2.0]
    assert "225.0" not in path.read_text()  # a head without groups must not turn whole numbers into fractions
    assert read_table("sweep", "stories", tmp_path).equals(table)


def test_curves_are_kept_of_runs_evaluated_on_their_way_and_of_others_where_asked(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "stories" / "sweep" / "one"
    write_text(folder / "row.json", json.dumps(row_of()))
    lines = [{"step": 5, "train_loss": 3.0}, {"step": 10, "train_loss": 2.0, "validation_loss_nats": 2.5}]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    curves = tmp_path / "stories" / "sweep_curves.csv"
    collect("sweep", "stories", tmp_path)
    assert not curves.exists()
    collect("sweep", "stories", tmp_path, with_curves=True)
    assert pd.read_csv(curves)[["step", "train_loss"]].to_numpy().tolist() == [[5, 3.0], [10, 2.0]]


def test_a_table_refuses_rows_that_its_key_does_not_tell_apart(tmp_path: Path) -> None:
    rows = pd.DataFrame([row_of(document=number) for number in range(3)])
    with pytest.raises(ValueError, match="2 rows are not told apart by run"):
        write_table(rows, tmp_path / "table.csv")
    assert len(pd.read_csv(write_table(rows, tmp_path / "table.csv", ("run", "document")))) == 3


def test_a_hash_that_looks_like_a_number_stays_as_it_is_written(tmp_path: Path) -> None:
    hashes = {"run": "0012345678", "commit": "745e176", "corpus_sha256": "1" * 64}
    path = write_table(pd.DataFrame([row_of(**hashes)]), tmp_path / "stories" / "sweep.csv")
    assert read_table("sweep", "stories", tmp_path)[list(hashes)].to_dict("records") == [hashes]
    others = beside_others(pd.DataFrame([row_of(run="9")]), path)
    assert others["run"].tolist() == ["0012345678", "9"] and others["commit"][0] == "745e176"


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_tables_have_a_row_a_run_and_lose_none_when_they_are_written_again(
    path: Path, tmp_path: Path
) -> None:
    table = read_table(path.stem, path.parent.name, RESULTS)
    key = KEYS.get(path.stem, ("run",))
    assert not table.duplicated(list(key)).any() and table["run"].notna().all()
    assert (table["corpus"] == path.parent.name).all() and table["corpus_sha256"].str.fullmatch("[0-9a-f]{64}").all()
    again = read_rows(write_table(table, tmp_path / path.name, key))
    again, table = (frame.sort_values(list(key)).reset_index(drop=True) for frame in (again, table))
    pd.testing.assert_frame_equal(again[table.columns], table)


def test_an_interrupted_write_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "table.csv"
    write_text(path, "old")
    with pytest.raises(KeyError), replacing(path) as beside:
        beside.write_text("half of the n")
        raise KeyError
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["table.csv"]
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in path.parent.iterdir()] == ["table.csv"]


def test_a_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    model, optimizer = small_state()
    save_checkpoint(tmp_path, model, optimizer, step=7)
    expected = torch.rand(3)
    other = nn.Linear(3, 2)
    other_optimizer = torch.optim.Adam(other.parameters())
    assert load_checkpoint(tmp_path, other, other_optimizer, CPU, {"step": int}) == {"step": 7}
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(other.weight, model.weight)
    assert other_optimizer.state_dict()["state"][0]["step"] == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "no archive", "another model"])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    model, optimizer = small_state()
    save_checkpoint(tmp_path, model, optimizer, step=7)
    path = tmp_path / CHECKPOINT_NAME
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        weights = bytes(model.weight.detach().numpy().tobytes())
        content[content.index(weights) + 3] ^= 0x55
        path.write_bytes(content)
    elif damage == "no archive":
        path.write_bytes(b"text")
    else:
        model = nn.Linear(4, 4)
        optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(UserError, match="delete it to start this run again") as caught:
        load_checkpoint(tmp_path, model, optimizer, CPU, {"step": int})
    assert "\n" not in str(caught.value)


class Malicious:
    """Its pickle runs a command where pickles are trusted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_checkpoint_executes_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    pickle.loads(pickle.dumps(Malicious(trace)))
    assert trace.is_dir()  # it does work where pickles are trusted
    trace.rmdir()
    torch.save({"model": Malicious(trace)}, tmp_path / CHECKPOINT_NAME)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_checkpoint(tmp_path, *small_state(), CPU, {"step": int})
    assert not trace.exists()


def test_weights_know_when_a_bit_has_flipped(tmp_path: Path) -> None:
    model, _ = small_state()
    save_weights(tmp_path, model, {"vocabulary_size": "5"})
    other = nn.Linear(3, 2)
    load_weights(tmp_path, other)
    assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_weights(tmp_path, other)
