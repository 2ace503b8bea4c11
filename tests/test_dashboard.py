"""What the mirror in Weights & Biases is told of a run, and the workspace that shows it; no network is needed here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from experiments.claims.dashboard import SECTIONS

from figure_cases import tables
from run_cases import experiment, settings_of
from vocabfold.runs.record import SUMMARIES, RunRecord, tags_of
from vocabfold.runs.tables import RUN_COLUMNS

PARTS = ("validation_group_loss", "validation_token_loss")
COMPRESSED = ("start=compress", "start.run=run", "embedding=int8")


class Mirror:
    """In the place of a run of wandb: keeps what it is told."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}
        self.metrics: dict[str, str] = {}
        self.summary: dict[str, Any] = {}

    def init(self, **told: Any) -> Mirror:
        self.told = told
        return self

    def define_metric(self, name: str, summary: str) -> None:
        self.metrics[name] = summary

    def finish(self, exit_code: int = 0) -> None:
        self.told["finished"] = exit_code == 0


@pytest.mark.parametrize(
    ("overrides", "job_type"),
    [
        ((), "train"),
        ((*COMPRESSED, "budget.steps=null", "budget.tokens=100"), "recover"),
        ((*COMPRESSED, "budget.steps=null", "budget.tokens=0"), "measure"),
        (("start=fold", "start.run=run"), "fold"),
    ],
)
def test_the_mirror_is_told_group_kind_tags_and_what_is_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], job_type: str
) -> None:
    mirror = Mirror()
    monkeypatch.setattr("wandb.init", mirror.init)
    settings = settings_of("wandb.mode=offline", "experiment=main_comparison", *overrides)
    tagged = {"corpus": "stories", "head": "paper", "partition_order": "random"}
    record = RunRecord(tmp_path / "run", settings, 0, tagged)
    record.finish({"validation_loss_nats": 3.0, "head": "paper"})
    assert mirror.told["group"] == f"{settings.corpus}/main_comparison" and mirror.told["job_type"] == job_type
    assert mirror.told["tags"] == [
        "corpus:stories",
        f"model:{settings.model.name}",
        "head:paper",
        "partition_order:random",
    ]
    assert mirror.metrics == SUMMARIES and mirror.metrics["validation_loss_nats"] == "min"
    # under a key of its own, or the final value would replace the best one
    assert mirror.summary == {"result": {"validation_loss_nats": 3.0, "head": "paper"}}
    assert mirror.told["finished"]


def test_runs_of_heads_scaling_stand_together_by_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = Mirror()
    monkeypatch.setattr("wandb.init", mirror.init)
    words = ["experiment=heads_scaling", "head=full_counts", "training_tokens=1000"]
    settings = settings_of("wandb.mode=offline", *words)
    RunRecord(tmp_path / "run", settings, 0, {"head": "full_counts"}).fail()
    assert mirror.told["group"] == "text/heads_scaling/full_counts"
    assert {"head:full_counts", "corpus:text", "training_tokens:1000"} < set(mirror.told["tags"])
    assert mirror.told["config"]["training_tokens"] == 1000


def test_a_tag_is_never_longer_than_the_server_takes() -> None:
    (tag,) = tags_of({"corpus": "x" * 100, "head": None})
    assert len(tag) == 64 and tag.startswith("corpus:xxx")


def test_the_workspace_has_the_report_s_panels(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    pytest.importorskip("wandb_workspaces")
    for name, value in {"WANDB_MODE": "offline", "WANDB_ENTITY": "someone", "WANDB_PROJECT": "p"}.items():
        monkeypatch.setenv(name, value)
    assert experiment(monkeypatch, "dashboard", "draw", "text") == 0
    sent = json.loads(capfd.readouterr().out)
    sections = SECTIONS
    assert (sent["entity"], sent["project"], sent["displayName"]) == ("someone", "p", "vocabfold: the report, text")
    built = sent["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in built] == list(sections)
    kinds = {
        "curve": "Run History Line Plot",
        "curve of runs": "Run History Line Plot",
        "bar": "Bar Chart",
        "point": "Scatter Plot",
    }
    for section, panels in zip(built, sections.values(), strict=True):
        assert [panel["viewType"] for panel in section["panels"]] == [kinds[kind] for kind, _, _ in panels]
        for panel, (kind, column, _) in zip(section["panels"], panels, strict=True):
            shown = json.dumps(panel["config"])
            assert (column if kind.startswith("curve") else f"result.{column}") in shown
            assert panel["config"].get("xLogScale", False) == (kind == "curve of runs")
    assert "corpus:text" in json.dumps(sent["spec"]["section"]["runSets"])


def test_every_panel_shows_what_runs_write() -> None:
    known = {*RUN_COLUMNS, *SUMMARIES, "step", "train_loss", *PARTS, *(key for _, rows in tables() for key in rows[0])}
    settings = {"head.name", "embedding.name"}
    for panels in SECTIONS.values():
        for _, column, against in panels:
            assert column in known and against in known | settings, (column, against)


@pytest.mark.parametrize(("obstacle", "words"), [("package", "pip install"), ("login", "wandb login")])
def test_an_obstacle_is_one_line(monkeypatch: pytest.MonkeyPatch, capfd: Any, obstacle: str, words: str) -> None:
    monkeypatch.setattr("wandb.login", lambda **_: False)
    if obstacle == "package":
        monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    monkeypatch.setenv("WANDB_MODE", "offline" if obstacle == "package" else "online")
    assert experiment(monkeypatch, "dashboard", "draw") == 2
    written = capfd.readouterr()
    assert written.err.count("\n") == 1 and words in written.err and written.out == ""
