"""Orders side by side, from two runs to the words: the losses, what the groups tell and the difference."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from run_cases import TINY, call, experiment, write_corpus
from vocabfold import train


@pytest.mark.slow
def test_runs_are_compared_by_their_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path)
    settings = [*TINY, "experiment=learned_orders", "training_tokens=600", "development_share=0.1"]
    settings += ["head.partition.group_size=25129"]  # two groups, so that the few words of this text share them
    heads = ("linear_clustered_counts", "linear_exchanged_counts")
    for head in heads:
        assert call(train.main, monkeypatch, *settings, f"head={head}") == 0, capfd.readouterr().err
    for _ in range(2):
        assert experiment(monkeypatch, "learned_orders", "measure") == 0
    assert "measured before" in capfd.readouterr().err
    groups = pd.read_csv("results/text/learned_orders_groups.csv").set_index("head")
    clustered, exchanged = (groups.loc[head, "mutual_information_nats"] for head in heads)
    assert exchanged > clustered + 0.01
    assert (groups["order_cpu_seconds"] > 0).all()
    assert experiment(monkeypatch, "learned_orders", "draw", "text") == 0
    written = Path("results/text/learned_orders.md").read_text()
    loss = pd.read_csv("results/text/learned_orders.csv").set_index("head")["validation_loss_nats"]
    line = next(line for line in written.splitlines() if heads[1] in line).split(" | ")
    assert line[2] == f"{loss[heads[1]]:.3f}"
    assert line[5] == f"{loss[heads[1]] - loss[heads[0]]:+.3f}"
    assert line[7] == f"{exchanged:.3f}"
