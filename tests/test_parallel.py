"""Training with the model spread over gloo processes (parallel=fsdp) against one process that has it whole.

Losses agree to 2e-5: in float32 sums over rows and batches are taken in another order. Resumed on as many processes, a
run goes on to the same bits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hydra import compose, initialize_config_dir

import vocabfold.train as training
from process_cases import on_ranks
from run_cases import PICTURES, TINY, write_corpus
from vocabfold.errors import UserError
from vocabfold.runs.record import read_metrics
from vocabfold.runs.settings import CONFIG_FOLDER, Settings, settings_from
from vocabfold.runs.sharding import latest

CLOCKED = ("tokens_per_second", "process_high_water_gib", "peak_memory_gib", "flops_per_token")
BASE = (*TINY, "log_every=1", "batch_size=4", "budget.steps=4", "gradient_accumulation=2", "model.dropout=0.0")
RELATIVE = 2e-5
# torch's own norm of a tensor of 800,000 gradients is off by up to 7.5e-5 in float32 on a CPU (its squares summed in
# float64 say so), and by less where each process sums a part. In float64 whole runs agree to 1e-14, norms included.
NORM_RELATIVE = 1.5e-4


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path)


def settings_of(*overrides: str, base: Sequence[str] = BASE) -> Settings:
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return settings_from(compose("train", [*base, *overrides]))


def metrics(folder: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in CLOCKED} for line in read_metrics(Path(folder))]


class Killed(Exception):
    """A process ends after its checkpoint."""


def train_on(rank: int, world_size: int, overrides: tuple[str, ...], killed: bool = False) -> str:
    """Train in this process of several; ``killed``: only to the first checkpoint. What went wrong, for a person."""
    if killed:
        save = training.Trainer.save

        def save_and_end(trainer: training.Trainer) -> None:
            save(trainer)
            raise Killed

        training.Trainer.save = save_and_end  # type: ignore[method-assign]
    try:
        training.train(settings_of("parallel=fsdp", *overrides), "")
    except Killed:
        return ""
    except UserError as error:
        return str(error)
    assert not killed
    return ""


def fsdp(world_size: int, *overrides: str, killed: bool = False) -> str:
    answers = set(on_ranks(world_size, train_on, overrides, killed))
    assert len(answers) == 1, answers
    return answers.pop()


def assert_same_weights(first: str, second: str) -> None:
    """The same names, shapes and words, and nearly the same numbers."""
    files = [Path(folder, "model.safetensors") for folder in (first, second)]
    headers = []
    for file in files:
        content = file.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        header["__metadata__"].pop("crc32")
        headers.append(header)
    assert headers[0] == headers[1]
    ours, theirs = (safetensors.torch.load_file(file) for file in files)
    for name, value in ours.items():
        # Adam divides by gradients near 0, where a rounding error is as large as the gradient: absolute, not relative.
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=2e-4)


def assert_same_metrics(first: str, second: str) -> None:
    """The same of every step, within rounding."""
    for line, other in zip(metrics(first), metrics(second), strict=True):
        assert line.pop("gradient_norm") == pytest.approx(other.pop("gradient_norm"), rel=NORM_RELATIVE)
        assert line == pytest.approx(other, rel=RELATIVE)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("head", ["head=full", pytest.param("head=folded", marks=pytest.mark.slow)])
def test_two_and_four_processes_give_the_losses_of_one(head: str, world_size: int) -> None:
    training.train(settings_of(head, "run_dir=whole"), "")
    assert len(metrics("whole")) == 4
    assert fsdp(world_size, head, "run_dir=spread") == ""
    assert_same_metrics("spread", "whole")
    assert_same_weights("spread", "whole")
    row, other = (json.loads(Path(name, "row.json").read_text()) for name in ("spread", "whole"))
    for name in ("num_parameters", "model_bytes", "tokens", "steps"):
        assert row[name] == other[name]
    assert not list(Path("spread").glob("checkpoint*"))


@pytest.mark.slow
def test_a_run_on_two_processes_goes_on_on_one_or_four() -> None:
    overrides = ("head=folded", "checkpoint_every=2")
    training.train(settings_of(*overrides, "run_dir=whole"), "")
    assert fsdp(2, *overrides, "run_dir=begun", killed=True) == ""
    path = latest(Path("begun"))
    assert path is not None and path.name == "checkpoint-2"
    for world_size in (1, 4):
        folder = f"on{world_size}"
        shutil.copytree("begun", folder)
        assert fsdp(world_size, *overrides, f"run_dir={folder}") == ""
        assert_same_metrics(folder, "whole")
        assert_same_weights(folder, "whole")


@pytest.mark.slow
def test_a_run_goes_on_on_as_many_processes_to_the_same_bits() -> None:
    overrides = ("head=full", "checkpoint_every=2", "model.dropout=0.1")
    assert fsdp(2, *overrides, "run_dir=through") == ""
    assert fsdp(2, *overrides, "run_dir=begun", killed=True) == ""
    assert fsdp(2, *overrides, "run_dir=begun") == ""
    assert metrics("begun") == metrics("through")
    files = [Path(name, "model.safetensors").read_bytes() for name in ("begun", "through")]
    assert files[0] == files[1]


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_refused_in_one_line(world_size: int) -> None:
    overrides = ("head=paper", "checkpoint_every=2", "run_dir=begun")
    assert fsdp(world_size, *overrides, killed=True) == ""
    file = next(Path("begun/checkpoint-2").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "wrong checksum" in fsdp(1, *overrides)


@pytest.mark.slow
def test_a_foreign_checkpoint_is_refused_and_an_unfinished_one_is_none() -> None:
    overrides = ("head=full", "checkpoint_every=2")
    assert fsdp(2, *overrides, "run_dir=begun", killed=True) == ""
    shutil.copytree("begun", "foreign")
    torch.save({"step": Path()}, "foreign/checkpoint-2/progress.pt")  # a class, which must not be made
    answer = fsdp(1, *overrides, "run_dir=foreign")
    assert answer.startswith("foreign/checkpoint-2 cannot be loaded (") and "\n" not in answer
    shutil.copytree("begun", "unfinished")
    Path("unfinished/checkpoint-2/progress.pt").unlink()  # written last: the process died before
    assert fsdp(1, *overrides, "run_dir=unfinished") == ""
    assert len(metrics("unfinished")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_gathers_halves_and_sums_floats(precision: str) -> None:
    """Gradients of each process are rounded to a half before they are summed: 1e-2 of the losses."""
    for world_size in (1, 2):
        assert fsdp(world_size, "head=folded", f"precision={precision}", f"run_dir=on{world_size}") == ""
    for line, other in zip(metrics("on2"), metrics("on1"), strict=True):
        assert line["train_loss"] == pytest.approx(other["train_loss"], rel=1e-2)
    weights = safetensors.torch.load_file("on2/model.safetensors")
    assert all(value.dtype != torch.bfloat16 and value.dtype != torch.float16 for value in weights.values())


def test_what_cannot_be_spread_is_refused() -> None:
    for base, override in ((BASE, "compile=true"), (PICTURES, "model=cnn")):
        with pytest.raises(UserError, match="parallel=ddp"):
            settings_of("parallel=fsdp", override, base=base)
    with pytest.raises(UserError, match="choose one of ddp, fsdp"):
        settings_of("parallel=tensor")
