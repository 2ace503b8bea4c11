"""What is measured on a card, rehearsed on the CPU at tiny sizes, and its tables in words and pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pytest
import torch
from experiments.cards import bench, gpu, gpu_decoding, gpu_heads, gpu_steps, gpu_words
from experiments.cards.bench import BROKEN, Case, Plan, Work, measure_cases
from experiments.cards.card_heads import (
    ADAPTIVE,
    CCE,
    FOLDED,
    FOLDED_CAPTURED,
    FULL,
    LINEAR,
    LOW_RANK,
    PAPER,
    SHORT,
    zipf_tokens,
)
from experiments.cards.gpu_steps import CAPTURED, EAGER, FORWARD, STEP
from experiments.cards.gpu_summary import read_part, summary_of
from experiments.cards.rows import CRASHED, ERROR, OK, OOM, REFUSED, Rows

from run_cases import REPOSITORY, experiment
from vocabfold.errors import UserError
from vocabfold.measure.flops import count_flops

CPU = torch.device("cpu")


def plan(seconds: float = 60.0) -> Plan:
    return Plan("test", CPU, time.time() + seconds, True, 2, 0.0)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every part was rehearsed."""
    folder = tmp_path_factory.mktemp("rehearsed")
    (folder / "results").mkdir()
    (folder / "results" / "paper").symlink_to(REPOSITORY / "results" / "paper")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for part in gpu.PARTS:
            gpu.measure_rows(part, "cpu", True, time.time() + 60)
    return folder


def table(folder: Path, part: str) -> pd.DataFrame:
    return pd.read_csv(folder / "results" / "cards_tiny" / f"gpu_{part}.csv")


@pytest.mark.slow  # CI runs it
def test_heads_alone_are_measured_in_every_round_beside_their_floors(rehearsed: Path) -> None:
    rows = table(rehearsed, "heads")
    measured = rows[rows["status"] == OK]
    every = {method for group in gpu_heads.GROUPS for method in group}
    assert set(rows["method"]) == every and len(measured) > 2 * 8
    assert set(rows[rows["status"] != OK]["method"]) <= {CCE, "cce_filtered", "liger", "chunked", FOLDED_CAPTURED}
    assert (measured.groupby("method")["round"].nunique() == 2).all()
    assert (measured[["milliseconds", "floor_milliseconds", "peak_above_gib"]] > 0).all(axis=None)
    losses = measured.groupby("method")["loss_nats"].first()
    assert losses[FULL] == losses["full_compiled"] and (losses < 2 * math.log(499)).all()
    assert list(rows.columns[-4:]) == ["hardware", "torch", "commit", "command"]


@pytest.mark.slow  # CI runs it
def test_steps_are_measured_whole_forward_only_and_captured(rehearsed: Path) -> None:
    rows = table(rehearsed, "steps")
    kinds = set(zip(rows["side"], rows["mode"], rows["pass"], strict=True))
    for side in (*gpu_steps.LEAN, *gpu_steps.PAPER_CODE):
        assert {(side, EAGER, STEP), (side, EAGER, FORWARD)} <= kinds
    assert {(side, CAPTURED, STEP) for side in gpu_steps.CAPTURED_SIDES} <= kinds
    assert set(rows["status"]) <= {OK, REFUSED}
    assert set(rows[rows["status"] == REFUSED]["mode"]) <= {CAPTURED}
    peak = rows[(rows["pass"] == STEP) & (rows["precision"] == "fp32")].groupby("side")["peak_memory_gib"].first()
    simulated = table(rehearsed, "simulated")
    simulated = simulated[simulated["precision"] == "fp32"].set_index("side")["peak_memory_gib"]
    for side in gpu_steps.LEAN:
        assert peak[side] == pytest.approx(simulated[side], rel=0.15), side
    assert peak["no_head"] == peak[list(gpu_steps.LEAN)].min()


@pytest.mark.slow  # CI runs it
def test_decoding_is_exact_and_measured_alone_and_whole(rehearsed: Path) -> None:
    rows = table(rehearsed, "decoding")
    assert (rows["status"] == OK).all()
    assert set(rows["work"]) == {"head", "whole"} and set(rows["strategy"]) == set(gpu_decoding.STRATEGIES)
    assert (rows["disagreements"] == 0).all() and (rows["largest_gap_nats"] == 0).all()
    assert (rows["entropy_nats"] < math.log(499)).all()


@pytest.mark.slow  # CI runs it
def test_all_of_it_is_drawn_and_a_second_run_measures_nothing(
    rehearsed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(rehearsed)
    monkeypatch.setattr(bench, "timed", None)
    folder = rehearsed / "results" / "cards_tiny"
    before = {path.name: path.read_bytes() for path in folder.glob("*.csv")}
    for part in gpu.PARTS:
        gpu.measure_rows(part, "cpu", True, time.time() + 60)
    assert {path.name: path.read_bytes() for path in folder.glob("*.csv")} == before
    assert experiment(monkeypatch, "gpu", "draw", "cards_tiny") == 0
    words = (folder / "gpu.md").read_text()
    assert words.strip() in capsys.readouterr().out
    for title in ("## Goals", "## Heads alone", "## Whole training steps", "## Decoding", "not measured"):
        assert title in words
    assert {path.name for path in folder.glob("*.png")} == {f"gpu_{part}.png" for part in gpu.ON_CARD}


def as_on_a_card(folder: Path) -> None:
    """Rows that a CPU refuses, as a card would have them; and one that did not fit."""
    path = folder / "gpu_heads.csv"
    rows = pd.read_csv(path, dtype=str)
    rows["vocabulary_size"], rows["hidden_size"] = "128256", "2048"
    own = rows[rows["method"] == FOLDED].assign(milliseconds="2.0", peak_above_gib="1.5")
    peers = [own.assign(method=name, milliseconds=ms) for name, ms in ((CCE, "10.0"), ("cce_filtered", "4.0"))]
    full = rows[rows["method"] == FULL].head(1).assign(status=OOM, milliseconds="")
    kept = rows[~rows["method"].isin([FOLDED, CCE, "cce_filtered", FULL])]
    pd.concat([own, *peers, full, kept]).to_csv(path, index=False)


@pytest.mark.slow  # CI runs it
def test_goals_against_peers_are_told(rehearsed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "results" / "cards_tiny"
    folder.mkdir(parents=True)
    (folder / "gpu_heads.csv").write_bytes((rehearsed / "results/cards_tiny/gpu_heads.csv").read_bytes())
    as_on_a_card(folder)
    monkeypatch.chdir(tmp_path)
    assert experiment(monkeypatch, "gpu", "draw") == 0
    words = (folder / "gpu.md").read_text()
    assert "0.20 of its time (goal 0.25: reached), 1.00 of its memory (goal 1: reached)" in words
    assert "0.50 of its time (goal 0.25: not reached)" in words and "| full | oom |" in words


def test_what_a_card_had_no_time_for_is_said() -> None:
    """From the committed tables: sides, sizes and methods that the plan has and the tables have not."""
    steps = read_part(Path("results/cards/gpu_steps.csv"))
    assert steps is not None
    missing = gpu_words.steps_left_out(summary_of(steps, gpu_steps.KEYS))
    assert "hidden 2,048 bf16 (all)" in missing and any("GPT-Neo, full" in words for words in missing)
    kept = steps[(steps["hidden_size"] == 128) & (steps["side"] == "no_head")]
    words = gpu_words.steps_words(kept, None)
    assert "hidden 128 bf16 captured (linear, sees its group; " in words and "1.53 GiB, less at the peak" in words
    heads = pd.read_csv("results/cards/gpu_heads.csv")
    assert "| full, torch.compile | not measured |" in gpu_words.heads_words(heads)


def test_memory_that_other_sides_had_reserved_is_not_told() -> None:
    assert gpu_words.reserved_gib(pd.Series({"peak_memory_gib": 1.0, "reserved_memory_gib": 1.5})) == 1.5
    assert math.isnan(gpu_words.reserved_gib(pd.Series({"peak_memory_gib": 1.0, "reserved_memory_gib": 0.03})))


@pytest.mark.parametrize("method", [FULL, LINEAR, FOLDED, LOW_RANK, SHORT, ADAPTIVE, PAPER])
def test_a_floor_has_no_more_operations_than_the_head_and_nearly_all(method: str) -> None:
    """Groups of unequal sizes are padded, so that a head may compute a little more."""
    torch.manual_seed(0)
    side = gpu_heads.HeadSide(method, 529, torch.randn(256, 32), zipf_tokens(256, 529, CPU))
    least = gpu_heads.flops_of(side.head, side.targets)
    assert least <= count_flops(side.step) * 1.001 and least > 0.8 * count_flops(side.step)


def rows_in(folder: Path) -> Rows:
    return Rows(folder / "gpu_test.csv", ("name",), ("own",))


def case(name: str, build: Callable[[], Work]) -> Case:
    return Case({"name": name}, build)


def test_what_fails_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    def fails(error: Exception) -> Callable[[], Work]:
        def build() -> Work:
            raise error

        return build

    works = case("works", lambda: Work(lambda: torch.ones(8).sum(), columns={"own": 3}))
    failing = [
        case("large", fails(torch.OutOfMemoryError("too much"))),
        case("refused", fails(UserError("not here"))),
        case("wrong", fails(ValueError("two\nlines"))),
    ]
    measure_cases([*failing, works], rows_in(tmp_path), plan())
    found = pd.read_csv(tmp_path / "gpu_test.csv").set_index("name")
    assert found["status"].to_dict() == {"large": OOM, "refused": REFUSED, "wrong": ERROR, "works": OK}
    assert (
        found["note"]["wrong"] == "ValueError: two lines" and len(found) == 5 and (found.loc["works", "own"] == 3).all()
    )
    with pytest.raises(SystemExit) as left:
        measure_cases(
            [case("broken", fails(RuntimeError("CUDA error: an illegal memory access")))], rows_in(tmp_path), plan()
        )
    assert left.value.code == BROKEN
    assert not [one for one in [*failing, works] if not rows_in(tmp_path).stands(one.key)]


def test_a_case_stands_until_what_it_depends_on_changes(tmp_path: Path) -> None:
    rows = rows_in(tmp_path)
    key = {"name": "a"}
    for status, on_another_commit in ((OOM, True), (ERROR, False), (REFUSED, False)):
        rows.add([{**key, "status": status}])
        assert rows_in(tmp_path).stands(key) and len(rows.rows) == 1  # each takes the place of the one before
        other = rows_in(tmp_path)
        other.origin = other.origin | {"commit": "another"}
        assert other.stands(key) == on_another_commit
    rows.add([{**key, "status": OK, "rounds": 2, "milliseconds": 1.0}])
    assert not rows.stands(key)
    rows.add([{**key, "status": OK, "rounds": 2, "milliseconds": 1.5}])
    assert rows_in(tmp_path).stands(key) and len(rows.rows) == 2
    card = rows_in(tmp_path)
    card.origin = card.origin | {"hardware": "another"}
    assert not card.stands(key)


def test_a_case_whose_process_died_is_a_row(tmp_path: Path) -> None:
    rows_in(tmp_path).begin({"name": "deadly"})
    rows = rows_in(tmp_path)
    assert rows.stands({"name": "deadly"}) and rows.rows[0]["status"] == CRASHED
    assert not list(tmp_path.glob("*.under_way"))


def test_nothing_begins_after_the_deadline(tmp_path: Path) -> None:
    measure_cases([case("late", lambda: Work(lambda: None))], rows_in(tmp_path), plan(seconds=-1))
    assert not (tmp_path / "gpu_test.csv").exists()


@pytest.mark.slow
def test_parts_run_in_processes_of_their_own_and_end_at_their_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert experiment(monkeypatch, "gpu", "measure", "--device", "cpu", "--tiny", "--part", "decoding") == 0
    said = capfd.readouterr().out
    assert "decoding: done" in said and len(table(tmp_path, "decoding")) == 2 * 24
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.0)
    assert gpu.run_within("heads", "cpu", True, 0.01) == "ended at its limit"
    assert gpu.run_within("nonesuch", "cpu", True, 30.0) == f"failed with status {gpu.FAILED}"
    assert "nonesuch: ModuleNotFoundError" in capfd.readouterr().out


class PretendedEvent:
    """Of torch.cuda: two milliseconds lie between any two of them."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _: PretendedEvent) -> float:
        return 2.0


class PretendedGraph:
    """Of torch.cuda: it counts its replays."""

    replays = 0

    def replay(self) -> None:
        PretendedGraph.replays += 1


@pytest.fixture
def pretended_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Just enough of torch.cuda for the lines that only run on a card; the work itself has no tensors there."""
    gib = 2**30
    figures = {"memory_allocated": gib, "memory_reserved": 2 * gib, "max_memory_allocated": 4 * gib}
    for name, value in (figures | {"max_memory_reserved": 6 * gib}).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for name in ("reset_peak_memory_stats", "synchronize", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: StreamOfCard())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", PretendedEvent)
    monkeypatch.setattr(torch.cuda, "Stream", StreamOfCard)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendedGraph)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)


class StreamOfCard:
    """Of torch.cuda: nothing waits."""

    def __init__(self, _: torch.device | None = None) -> None: ...

    def wait_stream(self, other: StreamOfCard) -> None:
        assert isinstance(other, StreamOfCard)


@pytest.mark.usefixtures("pretended_card")
def test_on_a_card_events_tell_the_time_and_the_allocator_the_memory(tmp_path: Path) -> None:
    card = torch.device("cuda")
    calls: list[str] = []
    eager = case("eager", lambda: Work(lambda: calls.append("eager"), divisor=2))
    graph = case("graph", lambda: Work(bench.captured(lambda: calls.append("graph"), card), peak_of_building=True))
    measure_cases([eager, graph], rows_in(tmp_path), Plan("test", card, time.time() + 60, False, 5, 20.0))
    found = pd.read_csv(tmp_path / "gpu_test.csv").groupby("name").first()
    assert found["milliseconds"].to_dict() == {"eager": 0.1, "graph": 0.2} and (found["calls"] == 10).all()
    assert (found["peak_memory_gib"] == 3).all() and (found["reserved_memory_gib"] == 4).all()
    assert calls.count("graph") == bench.WARM_UP + 1 and PretendedGraph.replays >= 2 + 5 * 11


@pytest.mark.slow  # CI runs it
def test_rows_of_code_that_has_changed_are_dropped_by_name(
    rehearsed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "results" / "cards_tiny"
    folder.mkdir(parents=True)
    for part in gpu.ON_CARD:
        (folder / f"gpu_{part}.csv").write_bytes((rehearsed / f"results/cards_tiny/gpu_{part}.csv").read_bytes())
    monkeypatch.chdir(tmp_path)
    gpu.forget([FOLDED], gpu.ON_CARD, tiny=True)
    for part in gpu.ON_CARD:
        before, after = table(rehearsed, part), table(tmp_path, part)
        column = "method" if "method" in before else "side"
        pd.testing.assert_frame_equal(after, before[before[column] != FOLDED].reset_index(drop=True), check_dtype=False)


def test_without_a_card_one_line_says_how_to_rehearse(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert experiment(monkeypatch, "gpu", "measure") == 2
    assert "--device cpu --tiny" in capfd.readouterr().err
    assert experiment(monkeypatch, "gpu", "measure", "--device", "cpu", "--seconds", "0") == 2
