"""In which step a folded head leads: a full softmax's losses of both steps, pairs of runs, and their table."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from experiments.heads import lead_by_step
from experiments.heads.lead_by_step import log_probs, pairs_of, standard_error
from torch import nn

from run_cases import TEXT, TINY, call, experiment, write_corpus
from vocabfold import train
from vocabfold.errors import UserError
from vocabfold.heads import FullHead, folded_head
from vocabfold.heads.base import Head

V, D = 23, 8


def states(number: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(number, D, generator=generator, dtype=torch.float64),
        torch.randint(V, (number,), generator=generator),
    )


@pytest.mark.parametrize("group_size", [1, 5, V])
def test_a_full_softmax_gives_a_group_the_sum_of_its_tokens(group_size: int) -> None:
    partition = folded_head(D, V, group_size=group_size).partition
    head = FullHead(D, V, with_bias=True).double()
    nn.init.normal_(head.weight)
    hidden, tokens = states()
    found = log_probs(head, partition, hidden, tokens)
    probabilities = head.log_prob(hidden).exp()
    for row, token in enumerate(tokens.tolist()):
        same = [other for other in range(V) if partition.group_of[other] == partition.group_of[token]]
        torch.testing.assert_close(found[row, 0].exp(), probabilities[row, same].sum())
        torch.testing.assert_close(found[row, 1].exp(), probabilities[row, token])


def test_a_folded_head_gives_its_own_two_steps_as_a_full_softmax_of_the_same_numbers_would() -> None:
    head = folded_head(D, V).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter)

    class Spread(Head):
        """The same distribution, without groups."""

        def log_prob(self, hidden: torch.Tensor) -> torch.Tensor:
            return head.log_prob(hidden)

    Spread.__abstractmethods__ = frozenset()
    hidden, tokens = states()
    spread = log_probs(Spread(D, V), head.partition, hidden, tokens)  # type: ignore[abstract]
    torch.testing.assert_close(log_probs(head, head.partition, hidden, tokens), spread)


def test_the_standard_error_counts_blocks_and_not_the_targets_within_them() -> None:
    blocks = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    repeated = blocks.repeat_interleave(256)
    assert standard_error(repeated) == pytest.approx(float(blocks.std()) / 3**0.5)
    assert standard_error(torch.cat([repeated, torch.full((255,), 100.0)])) == standard_error(repeated)
    assert math.isnan(standard_error(repeated[:500]))


def run_of(folder: Path, head: str, loss: float, kept: bool = True, **changes: Any) -> tuple[Path, dict[str, Any]]:
    folder = folder / f"{head}{len(list(folder.iterdir()))}"
    folder.mkdir()
    if kept:
        (folder / "model.safetensors").touch()
    row = {"head": head, "hidden_size": 64, "num_layers": 4, "tokens": 1000, "seed": 0, "validation_loss_nats": loss}
    return folder, row | changes


def test_runs_are_paired_with_the_best_full_softmax_of_the_same_seed_size_and_tokens(tmp_path: Path) -> None:
    folded = run_of(tmp_path, "folded", 3.0)
    best = run_of(tmp_path, "full_counts", 3.1)
    others = [
        run_of(tmp_path, "full_untied_counts", 3.2),
        run_of(tmp_path, "full_untied_counts", 3.0, kept=False),
        run_of(tmp_path, "full_counts", 2.0, seed=1),
        run_of(tmp_path, "full_counts", 2.0, tokens=2000),
        run_of(tmp_path, "full_counts", 2.0, hidden_size=128),
        run_of(tmp_path, "paper", 2.0),
    ]
    assert pairs_of([folded, *others, best], ["folded"]) == [(folded, best)]
    with pytest.raises(UserError, match="no run of folded has a full softmax of the same seed, size and tokens"):
        pairs_of([folded, *others[1:]], ["folded"])


def only(run: str, compared: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """``compared``, for the pair of that run alone."""

    def checked(folded: tuple[Path, dict[str, Any]], full: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
        assert folded[1]["run"] == run
        return compared(folded, full)

    return checked


@pytest.mark.slow
def test_pairs_of_runs_are_evaluated_once_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    tiny = [word for word in TINY if word != "budget=steps_2"]
    words = ["experiment=heads_scaling", "--multirun", "seed=0,1", "training_tokens=200,400"]
    assert call(train.main, monkeypatch, *tiny, *words, "head=full_counts,conditioned_tied_wide") == 0
    assert experiment(monkeypatch, "lead_by_step", "measure", *TEXT) == 0
    path = tmp_path / "results" / "text" / "lead_by_step.csv"
    table = pd.read_csv(path)
    assert len(table) == 4 and set(table["full_head"]) == {"full_counts"}
    # Both evaluations are those that the runs themselves made.
    assert table["loss_nats"].tolist() == pytest.approx(table["validation_loss_nats"].tolist(), abs=1e-5)
    assert (table["full_group_loss_nats"] > 0).all() and (table["full_token_loss_nats"] > 0).all()
    written = path.stat().st_mtime_ns
    assert experiment(monkeypatch, "lead_by_step", "measure", *TEXT) == 0
    assert path.stat().st_mtime_ns == written
    # A pair that is lacking is evaluated, and what stands of runs that are gone stays.
    table.drop(index=0).to_csv(path, index=False)
    (gone,) = (tmp_path / "results" / "runs").glob(f"*/*/*-{table['run'][1]}")
    shutil.rmtree(gone)
    with monkeypatch.context() as patched:
        patched.setattr(lead_by_step, "compared", only(table["run"][0], lead_by_step.compared))
        assert experiment(monkeypatch, "lead_by_step", "measure", *TEXT) == 0
    pd.testing.assert_frame_equal(pd.read_csv(path), table)
    assert experiment(monkeypatch, "lead_by_step", "draw", "text") == 0
    assert path.with_suffix(".md").read_text().count("`conditioned_tied_wide`") == 2
    assert experiment(monkeypatch, "lead_by_step", "measure", "--heads", "full_counts", *TEXT) == 2
