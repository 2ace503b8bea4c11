"""The benchmark of the two published listings at toy sizes, drawn again from its table, and its complaints."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pandas as pd
import pytest

from run_cases import TEXT, experiment

QUICK = ["measure", *TEXT, "--rounds", "2", "--tokens", "2", "8", "--group-sizes", "225", "3864", "--hidden-size", "4"]


def benchmark(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    return experiment(monkeypatch, "figure45_loop_or_shared", *arguments)


@pytest.mark.slow
def test_every_side_is_measured_at_every_size_and_drawn_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert benchmark(monkeypatch, *QUICK) == 0, capfd.readouterr().err
    results = folder / "results" / "cost"
    table = pd.read_csv(results / "figure45_loop_or_shared.csv")
    # each N at S = 225, the larger N at S = 3864 too: 3 points, 4 heads, 2 passes, 2 rounds
    assert len(table) == 3 * 4 * 2 * 2
    points = table[["tokens", "group_size"]].drop_duplicates().sort_values(["tokens", "group_size"])
    assert points.to_numpy().tolist() == [[2, 225], [8, 225], [8, 3864]]
    assert (table["seconds"] > 0).all()
    assert (table["groups_seen"] <= table["num_groups"]).all() and (table["groups_seen"] <= table["tokens"]).all()
    backward = table[table["pass"] == "forward and backward"]
    assert (backward["peak_memory_gib"] > 2 * backward["parameter_gib"]).all()  # parameters and their gradients
    assert benchmark(monkeypatch, "draw") == 0
    picture = results / "figure45_loop_or_shared.png"
    drawn = picture.read_bytes()
    assert matplotlib.image.imread(picture)[..., :3].std() > 0.05
    picture.unlink()
    assert benchmark(monkeypatch, "draw") == 0
    assert picture.read_bytes() == drawn


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["draw", "cost"], "is missing"),
        ([*QUICK, "--tokens", "0"], "at least 1"),
        ([*QUICK, "--tokens", "100000000"], "longer text"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert benchmark(monkeypatch, *arguments) == 2
    written = [line for line in capfd.readouterr().err.splitlines() if "|" not in line]  # but for the progress bar
    assert len(written) == 1 and words in written[0]
    assert not list((folder / "results").rglob("*.csv"))
