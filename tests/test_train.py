"""The training program: exact resume after SIGKILL, processes and accumulation that change nothing, clear ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from process_cases import on_ranks, start_program
from vocabfold import train as training
from vocabfold.data.batches import BatchPlan
from vocabfold.data.zipf import unigram_entropy_nats, zipf_law
from vocabfold.errors import UserError
from vocabfold.models.build import build_model
from vocabfold.runs.checkpoint import load_weights
from vocabfold.runs.compose import composed_settings
from vocabfold.runs.distributed import Ranks
from vocabfold.runs.optimizer import learning_rate_at
from vocabfold.runs.record import read_metrics
from vocabfold.runs.settings import OptimizerSettings, Settings
from vocabfold.runs.tables import RUN_COLUMNS

TINY = [
    "data=zipf",
    "data.vocabulary_size=997",
    "data.num_train_tokens=4000",
    "data.num_valid_tokens=300",
    "sequence_length=16",
    "batch_size=4",
    "model.hidden_size=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "budget.tokens=null",
    "wandb.mode=disabled",
    "log_every=1",
]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
# What a clock or the machine decides; everything else has to come out the same to the last bit.
CLOCKED = ("tokens_per_second", "process_high_water_gib", "peak_memory_gib")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder takes the results and the token cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))


def settings_of(*overrides: str) -> Settings:
    return composed_settings([*TINY, *overrides])


def without_clocks(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in CLOCKED} for line in read_metrics(folder)]


def test_a_run_leaves_config_metrics_row_and_weights() -> None:
    settings = settings_of("head=paper", "budget.steps=6", "run_dir=run")
    row = training.train(settings, "the command")
    folder = Path("run")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "model.safetensors",
        "row.json",
    ]
    assert json.loads((folder / "row.json").read_text()) == row
    assert set(RUN_COLUMNS) - {"shortlist"} <= set(row)
    assert row["steps"] == 6 and row["tokens"] == 6 * 4 * 16 and row["command"] == "the command"
    last = read_metrics(folder)[-1]
    for name in ("train_loss", "learning_rate", "gradient_norm", "validation_loss_nats", "perplexity"):
        assert name in last
    for name in ("group_loss", "token_loss", "group_accuracy", "token_accuracy"):
        assert f"train_{name}" in last and f"validation_{name}" in last
    assert last["tokens_per_second"] > 0 and last["peak_memory_gib"] > 0
    assert last["validation_loss_nats"] == pytest.approx(last["validation_group_loss"] + last["validation_token_loss"])


def test_validation_loss_is_the_mean_over_every_target() -> None:
    settings = settings_of("head=paper", "budget.steps=4", "run_dir=run", "evaluation_batch_size=3")
    row = training.train(settings, "")
    corpus = training.load_data(settings.data)
    model = build_model(settings.model, settings.head, corpus.vocabulary_size).eval()
    load_weights(Path("run"), model)
    tokens = torch.from_numpy(corpus.valid.tokens.astype("int64"))
    total = 0.0
    for start in range(0, len(tokens) - 1, settings.sequence_length):
        window = tokens[start : start + settings.sequence_length + 1]
        with torch.no_grad():
            hidden = model.backbone(window[None, :-1])[0].double()
            log_prob = model.double().head.log_prob(hidden)
            model.float()
        total -= float(log_prob.gather(-1, window[1:, None]).sum())
    assert row["validation_loss_nats"] == pytest.approx(total / (len(tokens) - 1), rel=1e-5)


@pytest.mark.parametrize("head", [pytest.param("full", marks=pytest.mark.slow), "paper"])
def test_training_approaches_the_entropy_rate(head: str) -> None:
    settings = settings_of(
        f"head={head}",
        "budget.epochs=4",
        "run_dir=run",
        "optimizer.learning_rate=0.02",
        "data.num_train_tokens=10000",
        "log_every=1000",
        "data.vocabulary_size=97",
        "data.num_valid_tokens=4000",
    )
    row = training.train(settings, "")
    law = {key: settings.data[key] for key in ("exponent", "offset", "num_topics", "stay", "seed", "id_order")}
    unigram_nats = unigram_entropy_nats(zipf_law(97, **law))
    assert row["validation_loss_nats"] < unigram_nats - 1.0  # only a model that reads the last token gets there
    assert row["excess_loss_nats"] > -0.1  # a sample of 4,000 tokens may lie a little below the rate


def test_a_killed_run_resumes_to_the_same_bits() -> None:
    overrides = ["head=paper", "budget.steps=24", "checkpoint_every=5", "evaluate_every=8", "model.dropout=0.1"]
    training.train(settings_of(*overrides, "run_dir=whole"), "")
    killed = Path("killed")
    process = start_program(Path("printed"), "vocabfold.train", *TINY, *overrides, "run_dir=killed")
    deadline = time.monotonic() + 60
    while len(read_metrics(killed)) < 8 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (killed / "row.json").exists()
    assert 5 <= torch.load(killed / "checkpoint.pt", weights_only=True)["step"] < 24
    training.train(settings_of(*overrides, "run_dir=killed"), "")
    assert without_clocks(killed) == without_clocks(Path("whole"))
    weights = load_file("whole/model.safetensors")
    torch.testing.assert_close(load_file(killed / "model.safetensors"), weights, rtol=0, atol=0)


def test_the_same_command_twice_trains_once() -> None:
    settings = settings_of("budget.steps=3", "run_dir=run")
    row = training.train(settings, "first")
    written = (Path("run") / "row.json").stat().st_mtime_ns
    assert training.train(settings, "second") == row
    assert (Path("run") / "row.json").stat().st_mtime_ns == written


def train_on(rank: int, world_size: int, words: list[str]) -> None:
    """Train in this process of several."""
    training.train(composed_settings(words), "")


def torchrun(words: list[str]) -> None:
    """The same in two processes, as a person starts them."""
    command = [*TORCHRUN, "vocabfold.train", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def assert_two_processes_equal_one(
    *overrides: str, base: list[str], in_two: Callable[[list[str]], object] = lambda words: on_ranks(2, train_on, words)
) -> None:
    training.train(composed_settings([*base, *overrides, "budget.steps=5", "run_dir=one"]), "")
    in_two([*base, *overrides, "budget.steps=5", "run_dir=two"])
    runs = [without_clocks(Path(folder)) for folder in ("one", "two")]
    assert len(runs[0]) == 5
    for first, second in zip(*runs, strict=True):
        for line in (first, second):
            line.pop("flops_per_token", None)  # of the first process's own rows: a head leaves padding out
        assert second == pytest.approx(first, rel=2e-5)


@pytest.mark.slow  # with different numbers of targets, and without torchrun, the quick tests ask the same
def test_two_processes_give_the_losses_of_one() -> None:
    assert_two_processes_equal_one("head=paper", "gradient_accumulation=2", base=TINY, in_two=torchrun)


def test_two_processes_with_different_numbers_of_targets_give_the_losses_of_one() -> None:
    """With one document a row, padded, each process holds its own number of targets; still all weigh the same."""
    words = "the cat sat on a mat and saw one small bird that sang to her all day long"
    for name in ("train.txt", "valid.txt"):
        documents = [words[: 12 + index * 5 % 53] for index in range(24)]
        Path(name).write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    text = ["data=text", "data.train=train.txt", "data.valid=valid.txt", "data.layout=padded"]
    assert_two_processes_equal_one("head=paper", base=text + [key for key in TINY if not key.startswith("data")])


def test_accumulated_batches_equal_one_large_batch() -> None:
    """Two batches of two sequences, summed, against their union in one batch: the same gradients and losses."""
    large_settings = settings_of("batch_size=4", "budget.steps=3", "run_dir=large")
    small_settings = settings_of("batch_size=2", "gradient_accumulation=2", "budget.steps=3", "run_dir=small")
    corpus = training.load_data(large_settings.data)
    large = training.Trainer(large_settings, corpus, Ranks(), torch.device("cpu"))
    small = training.Trainer(small_settings, corpus, Ranks(), torch.device("cpu"))
    for _ in range(3):
        first, second = large.train_step(1e-2, with_accuracy=True), small.train_step(1e-2, with_accuracy=True)
        assert second == pytest.approx(first, rel=1e-5)
    for one, other in zip(large.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("budget", "steps"), [("tokens=130", 3), ("steps=2", 2), ("epochs=0.5", None)])
def test_budgets_end_training(budget: str, steps: int | None) -> None:
    settings = settings_of(f"budget.{budget}", "run_dir=run")
    batches = training.load_data(settings.data).batches("train", BatchPlan(16, 4, seed=0))
    expected = steps if steps is not None else batches.batches_per_epoch // 2
    assert training.train(settings, "")["steps"] == expected


def test_a_budget_of_seconds_ends_training() -> None:
    settings = settings_of("budget.seconds=1.5", "run_dir=run", "log_every=1000")
    started = time.monotonic()
    row = training.train(settings, "")
    assert row["steps"] > 5 and time.monotonic() - started < 30
    assert read_metrics(Path("run"))[-1]["learning_rate"] < 0.5 * settings.optimizer.learning_rate


def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of("budget.steps=30", "checkpoint_every=2", "run_dir=run")
    step = training.Trainer.train_step

    def poisoned(trainer: training.Trainer, learning_rate: float, with_accuracy: bool) -> dict[str, float]:
        if trainer.step == 4:
            with torch.no_grad():
                trainer.model.backbone.token_embedding.weight.fill_(torch.nan)
        return step(trainer, learning_rate, with_accuracy)

    expected = r"nan at step 5 \(epoch 0, batch 4 of \d+\).*checkpoint is of step 4 in run"
    with monkeypatch.context() as patched:
        patched.setattr(training.Trainer, "train_step", poisoned)
        with pytest.raises(UserError, match=expected):
            training.train(settings, "")
    assert not Path("run/row.json").exists()
    assert training.train(settings, "")["steps"] == 30


def test_weights_that_the_last_step_spoils_make_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    step = training.Trainer.train_step

    def spoiled(trainer: training.Trainer, learning_rate: float, with_accuracy: bool) -> dict[str, float]:
        metrics = step(trainer, learning_rate, with_accuracy)
        with torch.no_grad():
            trainer.model.backbone.token_embedding.weight.fill_(torch.nan)  # type: ignore[union-attr, operator]
        return metrics

    monkeypatch.setattr(training.Trainer, "train_step", spoiled)
    with pytest.raises(UserError, match="the loss is nan at step 1"):
        training.train(settings_of("budget.steps=1", "run_dir=run"), "")
    assert not Path("run/row.json").exists()


def test_bfloat16_autocast_and_adamw_train() -> None:
    row = training.train(
        settings_of(
            "precision=bf16", "optimizer.name=adamw", "optimizer.weight_decay=0.1", "budget.steps=5", "run_dir=run"
        ),
        "",
    )
    assert 0 < row["validation_loss_nats"] < 12


def test_a_run_says_that_it_compiles(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)
    training.train(settings_of("compile=true", "budget.steps=1", "run_dir=run"), "")
    assert "torch.compile compiles during the first steps" in capfd.readouterr().err


def test_a_long_validation_shows_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of("budget.steps=1", "run_dir=run", "evaluation_batch_size=8")
    trainer = training.Trainer(settings, training.load_data(settings.data), Ranks(), torch.device("cpu"))
    batches = list(trainer.valid.evaluation_batches())
    assert trainer.valid.num_evaluation_batches == len(batches) > 1

    def slowly() -> Any:
        time.sleep(1.1)
        yield from batches

    monkeypatch.setattr(trainer.valid, "evaluation_batches", slowly)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # a log file is spared
    trainer.evaluate()
    assert "validation: " in capfd.readouterr().err


def test_learning_rate_schedules() -> None:
    settings = OptimizerSettings(
        name="adam",
        learning_rate=2.0,
        betas=[0.9, 0.99],
        weight_decay=0.0,
        schedule="cosine",
        warmup_steps=4,
        final_fraction=0.1,
    )
    assert learning_rate_at(settings, 0, 0.0) == pytest.approx(0.5)
    assert learning_rate_at(settings, 10, 0.5) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate_at(settings, 10, 1.0) == pytest.approx(0.2)
    settings.schedule = "constant"
    assert learning_rate_at(settings, 10, 0.9) == pytest.approx(2.0)


def test_the_parameter_counts_of_the_paper() -> None:
    """8.1 M, 19.3 M and 152 M (152.76, cut): the tied GPT-2 of the paper at hidden 128, 256 and 1024."""
    for hidden_size, millions in ((128, 8.1), (256, 19.3), (1024, 152.8)):
        settings = composed_settings([f"size=hidden{hidden_size}", "budget=paper"])
        with torch.device("meta"):
            model = build_model(settings.model, settings.head, 50_257)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert round(count / 1e6, 1) == millions
