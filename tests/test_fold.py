"""Folding a trained full softmax: exact within the groups, fitted between them; a run made from a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from head_cases import HIDDEN_SIZE, LAYOUTS, Layout, make_head, make_hidden, naive_groups
from run_cases import TINY, call, write_corpus
from vocabfold import generate, start, train
from vocabfold.errors import UserError
from vocabfold.heads import FoldedHead, FullHead, Partition, equal_partition
from vocabfold.heads.fold import distillation_loss, fold, group_logits
from vocabfold.runs.load import load_run
from vocabfold.runs.record import finished_row, read_metrics
from vocabfold.runs.settings import load_settings
from vocabfold.trainer import Trainer


def teacher_of(layout: Layout, kind: str = "full_tied") -> tuple[FullHead, Partition]:
    head, _ = make_head(kind, layout)
    assert isinstance(head, FullHead)
    order = layout.order()
    return head, equal_partition(layout.vocabulary_size, layout.group_size, order, layout.shortlist)


def naive_group_logits(head: FullHead, layout: Layout, hidden: Tensor) -> Tensor:
    groups = naive_groups(layout)
    return torch.stack([(hidden @ head.weight[tokens].t()).exp().sum(1).log() for tokens in groups], dim=1)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_group_logits_are_the_teachers_sums(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vocabfold.heads.fold.CHUNK_TOKENS", 10)  # so that more than one block is needed
    head, partition = teacher_of(layout)
    hidden = make_hidden(7)
    expected = naive_group_logits(head, layout, hidden)
    torch.testing.assert_close(group_logits(head, partition, hidden), expected, rtol=1e-12, atol=1e-12)
    marginals = group_logits(head, partition, hidden).softmax(dim=-1)
    summed = torch.zeros_like(marginals).index_add(1, partition.group_of, head.log_prob(hidden).exp())
    torch.testing.assert_close(marginals, summed, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_within_the_groups_nothing_is_lost(layout: Layout, tied: bool) -> None:
    head, partition = teacher_of(layout, "full_tied" if tied else "full_free")
    hidden = make_hidden(7)
    for fitted_on in (None, make_hidden(40, seed=2)):
        folded = fold(head, partition, fitted_on, tied=tied)
        within = folded.log_prob(hidden) - folded.group_log_prob(hidden)[:, partition.group_of]
        group_log_prob = naive_group_logits(head, layout, hidden).log_softmax(dim=-1)
        expected = head.log_prob(hidden) - group_log_prob[:, partition.group_of]
        torch.testing.assert_close(within, expected, rtol=1e-10, atol=1e-10)
        assert (folded.scorer.weight is head.weight) == tied


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_groups_of_one_token_and_one_group_alone_are_exact(layout: Layout) -> None:
    head, partition = teacher_of(layout)
    folded = fold(head, partition, make_hidden(40, seed=2))
    single = partition.single_groups
    rows = head.weight[partition.order[partition.boundaries[single]]]
    torch.testing.assert_close(folded.group_weight[single], rows, rtol=1e-9, atol=1e-9)
    if len(single) == partition.num_groups or partition.num_groups == 1:
        hidden = make_hidden(7)
        torch.testing.assert_close(folded.log_prob(hidden), head.log_prob(hidden), rtol=1e-9, atol=1e-9)


def hidden_with_a_constant(num_rows: int, seed: int) -> Tensor:
    hidden = make_hidden(num_rows, seed)
    hidden[:, 0] = 0.3
    return hidden


@pytest.mark.parametrize("name", ["prime", "group_size_not_dividing", "shortlist"])
def test_where_the_groups_logits_are_linear_the_whole_head_is_the_teachers(name: str) -> None:
    head, partition = teacher_of(LAYOUTS[name])
    slopes = torch.randn(partition.num_groups, HIDDEN_SIZE, dtype=torch.float64)
    with torch.no_grad():  # rows of a group differ by a constant alone
        head.weight[:, 1:] = slopes[partition.group_of, 1:]
    folded = fold(head, partition, hidden_with_a_constant(3000, seed=2))
    hidden = hidden_with_a_constant(7, seed=3)
    torch.testing.assert_close(folded.log_prob(hidden), head.log_prob(hidden), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_all_that_is_lost_is_the_distillation_loss(layout: Layout) -> None:
    head, partition = teacher_of(layout)
    hidden = make_hidden(7)
    folded = fold(head, partition)
    teacher, student = head.log_prob(hidden), folded.log_prob(hidden)
    lost = (teacher.exp() * (teacher - student)).sum(dim=-1).mean()
    loss = distillation_loss(folded, hidden, group_logits(head, partition, hidden))
    torch.testing.assert_close(loss, lost, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradient_of_the_distillation(layout: Layout) -> None:
    head, partition = teacher_of(layout)
    hidden = make_hidden(7)
    folded = fold(head.requires_grad_(False), partition)
    folded.scorer.requires_grad_(False)
    target = naive_group_logits(head, layout, hidden).softmax(dim=-1)
    distillation_loss(folded, hidden, group_logits(head, partition, hidden)).backward()
    student = (hidden @ folded.group_weight.detach().t()).softmax(dim=-1)
    expected = (student - target).t() @ hidden / len(hidden)
    torch.testing.assert_close(folded.group_weight.grad, expected, rtol=1e-9, atol=1e-12)
    assert all(parameter.grad is None for parameter in [head.weight, *folded.scorer.parameters()])


def test_an_empty_batch_has_no_distillation_loss() -> None:
    head, partition = teacher_of(LAYOUTS["prime"])
    hidden = make_hidden(0)
    folded = fold(head, partition)
    loss = distillation_loss(folded, hidden, group_logits(head, partition, hidden))
    loss.backward()
    assert loss.item() == 0 and folded.group_weight.grad is not None and not folded.group_weight.grad.any()


def kl(folded: FoldedHead, head: FullHead, hidden: Tensor) -> float:
    return distillation_loss(folded, hidden, group_logits(head, folded.partition, hidden)).item()


@pytest.mark.parametrize("name", ["prime", "group_size_not_dividing", "shortlist"])
def test_the_fit_is_better_than_mean_rows_and_near_what_descent_finds(name: str) -> None:
    head, partition = teacher_of(LAYOUTS[name])
    with torch.no_grad():  # the rows of a group resemble each other, as a trained model's do
        slopes = torch.randn(partition.num_groups, HIDDEN_SIZE, dtype=torch.float64)
        head.weight.mul_(0.5).add_(slopes[partition.group_of])
    fitted_on, held_out = hidden_with_a_constant(500, seed=2), hidden_with_a_constant(100, seed=3)
    folded = fold(head, partition, fitted_on)
    at_once, mean_rows = kl(folded, head, held_out), kl(fold(head, partition), head, held_out)
    target = group_logits(head, partition, fitted_on)
    optimizer = torch.optim.LBFGS([folded.group_weight], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = distillation_loss(folded, fitted_on, target)
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    descended = kl(folded, head, held_out)
    print(at_once, mean_rows, descended)
    assert at_once < 0.9 * mean_rows
    assert at_once < 2 * descended


def test_a_group_that_is_never_expected_stays_finite() -> None:
    head, partition = teacher_of(LAYOUTS["prime"])
    with torch.no_grad():
        head.weight[partition.group_of == 3, 0] = -1e4
    hidden = hidden_with_a_constant(50, seed=2)
    folded = fold(head, partition, hidden)
    assert folded.group_weight.isfinite().all() and math.isfinite(kl(folded, head, hidden))


def test_what_cannot_be_folded_is_refused() -> None:
    head, partition = teacher_of(LAYOUTS["prime"])
    with pytest.raises(UserError, match="partition is of 50 tokens, the head has 97"):
        fold(head, equal_partition(50))
    with pytest.raises(UserError, match="no hidden states"):
        fold(head, partition, make_hidden(0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run."""
    folder = tmp_path_factory.mktemp("fold")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("VOCABFOLD_CACHE", str(folder / "cache"))
        write_corpus(folder)
        assert call(train.main, patch, *TINY, "head=full", "run_dir=teacher", "seed=3") == 0
    return folder


@pytest.fixture
def run(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as the current folder, with few tokens to fit the groups on."""
    monkeypatch.chdir(trained)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(trained / "cache"))
    monkeypatch.setattr(start, "FITTED_TOKENS", 50)
    return trained


FOLD = ["start=fold", "start.run=teacher", "wandb.mode=disabled", "device=cpu"]


@pytest.mark.parametrize("tokens", [0, 128])
def test_a_folded_run_is_a_run_like_any_other(run: Path, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    folder = run / f"folded{tokens}"
    options = ["head.partition.order=frequency", "head.partition.shortlist=2048", f"budget.tokens={tokens}"]
    assert call(train.main, monkeypatch, *FOLD, *options, f"run_dir={folder}") == 0
    taught, row, settings = finished_row(run / "teacher"), finished_row(folder), load_settings(folder)
    assert taught is not None and row is not None
    assert (settings.seed, settings.batch_size, settings.model.hidden_size) == (3, 2, 16)
    assert row["teacher_loss_nats"] == taught["validation_loss_nats"]
    assert row["tokens"] == row["distillation_tokens"] == tokens and row["steps"] == tokens // 32
    assert (row["validation_loss_nats"] == row["at_once_loss_nats"]) == (tokens == 0)
    assert row["at_once_loss_nats"] < taught["validation_loss_nats"] + 0.1
    assert row["at_once_perplexity"] == pytest.approx(math.exp(row["at_once_loss_nats"]))
    assert (row["start_tokens"], row["recovery_tokens"]) == (50, None)
    evaluated = [line["validation_loss_nats"] for line in read_metrics(folder) if "perplexity" in line]
    assert evaluated[0] == row["at_once_loss_nats"] and evaluated[-1] == row["validation_loss_nats"]
    # The tokens' rows and the backbone are the teacher's, to the bit.
    teacher, folded = (load_run(path, torch.device("cpu")) for path in (run / "teacher", folder))
    kept = [name for name in folded.state_dict() if name.startswith("backbone.")]
    assert kept and all(torch.equal(folded.state_dict()[name], teacher.state_dict()[name]) for name in kept)
    assert call(generate.main, monkeypatch, str(folder), "the cat", "--max-tokens", "5") == 0
    before = (folder / "row.json").stat().st_mtime_ns
    assert call(train.main, monkeypatch, *FOLD, *options, f"run_dir={folder}") == 0
    assert before == (folder / "row.json").stat().st_mtime_ns


def test_a_distillation_that_was_killed_goes_on_to_the_same_loss(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*FOLD, "head.partition.order=frequency", "budget.tokens=128", "checkpoint_every=2", "log_every=1"]
    assert call(train.main, monkeypatch, *options, "run_dir=whole") == 0
    step = Trainer.train_step

    def killed(trainer: Trainer, *arguments: Any) -> dict[str, float]:
        if trainer.step == 3:
            raise UserError("killed")
        return step(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed)
        assert call(train.main, patch, *options, "run_dir=killed") == 2
    assert call(train.main, monkeypatch, *options, "run_dir=killed") == 0
    whole, resumed = finished_row(run / "whole"), finished_row(run / "killed")
    assert whole is not None and resumed is not None
    for name in ("validation_loss_nats", "at_once_loss_nats", "teacher_loss_nats", "tokens"):
        assert whole[name] == resumed[name], name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["start.run=nonesuch"], "holds no config.yaml"),
        (["start.run=null"], "begin from a finished run"),
        (["budget.tokens=-1"], "budget.tokens is -1"),
        (["optimizer.learning_rate=0"], "learning_rate is 0"),
        (["head.partition.order=alphabetical"], "order is 'alphabetical'"),
        (["head.partition.group_size=99999"], "group_size is 99999"),
        (["head.partition.shortlist=50257"], "shortlist is 50257"),
        (["head=paper"], "keeps the run's rows"),
        (["head.partition.symbols=3"], "leave head.partition.symbols out"),
        (["head.label_smoothing=0.1"], "leave head.label_smoothing out"),
        (["seed=4"], "takes seed from teacher"),
        (["model.hidden_size=32"], "takes model from teacher"),
    ],
)
def test_what_cannot_be_folded_is_refused_in_one_line(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    capfd.readouterr()
    assert call(train.main, monkeypatch, *FOLD, "run_dir=refused", *options) == 2
    assert words in capfd.readouterr().err.strip().splitlines()[-1]
    assert not (run / "refused" / "row.json").exists()


def test_a_folded_run_has_no_full_softmax_to_fold(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(train.main, monkeypatch, *FOLD, "budget.tokens=0", "run_dir=once") == 0
    capfd.readouterr()
    assert call(train.main, monkeypatch, *FOLD, "start.run=once", "run_dir=twice") == 2
    assert "has no full softmax to fold" in capfd.readouterr().err
