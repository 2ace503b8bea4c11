"""The paper's experiments on a text with several budgets: the largest is drawn, with what there is beside it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from experiments.claims.largest_budget import order_at_most_tokens

from figure_cases import run_row
from run_cases import REPOSITORY, experiment
from scaling_cases import scaling_row
from vocabfold.runs.tables import write_table


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for reference in ("paper", "cost"):
        shutil.copytree(REPOSITORY / "results" / reference, tmp_path / "results" / reference)
    return tmp_path / "results"


def paper_rows(tokens: float, loss: float, **changes: Any) -> list[dict[str, Any]]:
    return [
        run_row("gpt2", "paper", size, seed, corpus="long", tokens=tokens, group_accuracy=0.5, **changes)
        | {"validation_loss_nats": loss + 0.01 * seed + size / 1e5}
        for size in (14, 225, 3864)
        for seed in (0, 1)
    ]


def test_group_sizes_of_the_largest_budget_are_drawn_with_or_without_a_baseline(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pd.DataFrame(paper_rows(1e6, 6.0) + paper_rows(2e6, 5.0)).assign(experiment="figure3_group_size")
    write_table(rows, results / "long" / "figure3_group_size.csv")
    assert experiment(monkeypatch, "figure3_group_size", "draw", "long") == 0
    words = (results / "long" / "figure3_group_size.md").read_text()
    assert words.startswith("long; hidden 64, 4 layers; 2.00 M tokens") and "| 225 | 5.007 ±" in words
    assert "6.0" not in words.split("Worst loss")[0] and "full softmax" not in words


def test_orders_of_the_largest_budget_stand_beside_the_linear_heads_of_heads_scaling(
    results: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [
        row | {"scorer": "scale_shift_sorted", "partition_order": order, "run": f"{order}{row['run']}", "head": order}
        for order, more in (("bpe", 0.3), ("clustered", 0.0))
        for tokens, loss in ((1e6, 6.0), (4e6, 5.0))
        for row in paper_rows(tokens, loss + more)
    ]
    write_table(pd.DataFrame(rows).assign(experiment="order_matters"), results / "long" / "order_matters.csv")
    assert experiment(monkeypatch, "order_matters", "draw", "long") == 0
    words = (results / "long" / "order_matters.md").read_text()
    assert "| scale and shift | 225 | clustered | 0.002 | 5.007 ±" in words and "One rate a scorer." in words
    assert "-0.300 ± 0.000" in words and "one linear layer a group" not in words
    linear = [
        scaling_row(f"linear_{order}", tokens, seed, loss + 0.1 * seed, corpus="long", partition_order=order)
        for order, loss in (("bpe", 5.4), ("clustered", 5.1))
        for tokens in (1e6, 4e6)
        for seed in (0, 1)
    ]
    write_table(pd.DataFrame(linear), results / "long" / "heads_scaling.csv")
    assert experiment(monkeypatch, "order_matters", "draw", "long") == 0
    words = (results / "long" / "order_matters.md").read_text()
    (line,) = [line for line in words.splitlines() if line.startswith("| one linear layer a group | 225 | clustered")]
    assert "| 5.150 ± 0.635 |" in line and "| -0.300 ± 0.000 |" in line and line.endswith("| 2 |")
    assert "order_matters_group_accuracy" not in capfd.readouterr().out  # its curves are those of heads_pareto


def test_one_seed_of_an_order_decides_nothing(results: Path) -> None:
    rows = [
        row | {"partition_order": order, "run": f"{order}{row['run']}"}
        for order in ("bpe", "frequency", "random")
        for tokens in (1e6, 4e6)
        for row in paper_rows(tokens, 6.0 - tokens / 4e6)
        if tokens == 1e6 or row["seed"] == 0
    ]
    write_table(pd.DataFrame(rows).assign(experiment="order_matters"), results / "long" / "order_matters.csv")
    assert all("1.0 M tokens" in check.asked for check in order_at_most_tokens("long").checks)
