"""A run's folder through kills, second starts and full disks: one process at a time, nothing left behind, one line."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from process_cases import start_program
from test_train import TINY, settings_of, without_clocks
from vocabfold import train as training
from vocabfold.command_line import Interrupted
from vocabfold.errors import UserError
from vocabfold.files import replacing
from vocabfold.runs import record as records
from vocabfold.runs.checkpoint import save_checkpoint, save_weights, weights_metadata
from vocabfold.runs.folder import disk_error
from vocabfold.runs.settings import Settings
from vocabfold.runs.stopping import stop_requests

HOLD_A_FOLDER = """
import sys, time
from pathlib import Path
from vocabfold.runs.folder import occupied
with occupied(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder takes the results and the token cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: object) -> None:
    """Call ``act`` in the middle of the training step of that number."""
    train_step = training.Trainer.train_step

    def patched(trainer: training.Trainer, learning_rate: float, with_accuracy: bool) -> dict[str, float]:
        metrics = train_step(trainer, learning_rate, with_accuracy)
        if trainer.step == step:
            act()  # type: ignore[operator]
        return metrics

    monkeypatch.setattr(training.Trainer, "train_step", patched)


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """The kernel refuses larger files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_folder_takes_one_process_until_that_is_killed() -> None:
    settings = settings_of("budget.steps=2", "run_dir=run")
    command = [sys.executable, "-c", HOLD_A_FOLDER, "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is at work in the run folder run: wait for it or end it"):
            training.train(settings, "")
        assert list(Path("run").iterdir()) == []
        holder.kill()
    assert training.train(settings, "")["steps"] == 2


def test_a_run_that_another_process_has_finished_meanwhile_is_not_trained_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_of("budget.steps=2", "run_dir=run")
    build = training.Trainer.__init__

    def slowly(trainer: training.Trainer, *arguments: object) -> None:
        build(trainer, *arguments)  # type: ignore[arg-type]
        with monkeypatch.context() as other_process:
            other_process.setattr(training.Trainer, "__init__", build)
            training.train(settings, "the other one")

    monkeypatch.setattr(training.Trainer, "__init__", slowly)
    assert training.train(settings, "this one")["command"] == "the other one"


# Steps whose evaluation must not be lost: one on the way, and the last.
@pytest.mark.parametrize(("number", "status", "step"), [(signal.SIGINT, 130, 8), (signal.SIGTERM, 143, 12)])
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int, step: int
) -> None:
    overrides = ["budget.steps=12", "evaluate_every=4", "model.dropout=0.1", "checkpoint_every=null"]
    training.train(settings_of(*overrides, "run_dir=whole"), "")
    settings = settings_of(*overrides, "run_dir=stopped")
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match=f"interrupted at step {step}: the same command continues") as stop:
            training.train(settings, "")
    assert stop.value.status == status
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert torch.load("stopped/checkpoint.pt", weights_only=True)["step"] == step
    training.train(settings, "")
    assert without_clocks(Path("stopped")) == without_clocks(Path("whole"))
    # equal runs are equal files, whoever may read them
    whole, stopped = (Path(name) / "model.safetensors" for name in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()
    Path("new").touch()
    assert whole.stat().st_mode == Path("new").stat().st_mode


def test_equal_weights_are_equal_files() -> None:
    words = {f"word{number}": str(number) for number in range(12)}
    model = torch.nn.Linear(1, 1)
    for folder in ("one", "two"):
        save_weights(Path(folder), model, words)
    one, two = (Path(folder, "model.safetensors").read_bytes() for folder in ("one", "two"))
    assert one == two and weights_metadata(Path("one")).items() >= words.items()


def test_the_program_ends_with_the_status_of_its_signal() -> None:
    process = start_program(Path("printed"), "vocabfold.train", *TINY, "run_dir=run", "budget.steps=100000")
    deadline = time.monotonic() + 60
    while not (Path("run/metrics.jsonl").is_file() and Path("run/metrics.jsonl").stat().st_size):
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.01)
    process.terminate()
    process.join(timeout=60)
    assert process.exitcode == 143
    lines = Path("printed").read_text().splitlines()
    step = torch.load("run/checkpoint.pt", weights_only=True)["step"]
    assert lines[-1] == f"interrupted at step {step}: the same command continues from there"
    assert "Traceback" not in "".join(lines)


def test_a_second_request_ends_the_run_at_once_and_an_echo_of_the_first_does_not() -> None:
    with stop_requests() as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.status == 130
        request.asked_at -= 2
        with pytest.raises(Interrupted, match="interrupted again"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)


@pytest.mark.parametrize(("minutes", "step"), [("0", 4), ("60", None), ("null", None)])
def test_a_checkpoint_is_written_when_its_time_has_come(
    monkeypatch: pytest.MonkeyPatch, minutes: str, step: int | None
) -> None:
    settings = settings_of("budget.steps=9", "run_dir=run", "checkpoint_every=null", f"checkpoint_minutes={minutes}")

    def die() -> None:
        raise MemoryError

    at_step(monkeypatch, 5, die)
    with pytest.raises(MemoryError):
        training.train(settings, "")
    path = Path("run/checkpoint.pt")
    assert (torch.load(path, weights_only=True)["step"] if path.exists() else None) == step


def test_a_run_of_the_default_length_writes_a_checkpoint() -> None:
    settings = settings_of("batch_size=8", "sequence_length=128", "budget.tokens=200000")
    steps = settings.total_steps(10_000, 8 * 128)
    assert settings.checkpoint_every is not None and steps is not None and settings.checkpoint_every < steps


@pytest.mark.parametrize("allowed_bytes", [1000, 3000, 50_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(allowed_bytes: int) -> None:
    """Full for config.yaml, for metrics.jsonl in the middle of the run, for the weights."""
    settings = settings_of("budget.steps=12", "run_dir=run", "checkpoint_every=null")
    training.load_data(settings.data)  # the cache has its own message
    with (
        files_of_at_most(allowed_bytes),
        pytest.raises(UserError, match=r"^cannot write to the run folder run \(File too large\): .*run_dir=FOLDER$"),
    ):
        training.train(settings, "")
    assert not list(Path("run").glob(".*"))
    assert training.train(settings, "")["steps"] == 12


def test_a_checkpoint_for_which_there_is_no_room_leaves_the_one_before() -> None:
    settings = settings_of("budget.steps=9", "run_dir=run", "checkpoint_every=4")
    training.load_data(settings.data)
    with files_of_at_most(100_000), pytest.raises(UserError, match="cannot write to the run folder run"):
        training.train(settings, "")
    assert sorted(path.name for path in Path("run").iterdir()) == ["config.yaml", "metrics.jsonl"]


def test_what_may_not_be_written_is_told_in_the_words_of_the_system() -> None:
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    later = RuntimeError("the archive was not closed")
    later.__context__ = denied
    assert disk_error(denied) == disk_error(later) == "Permission denied"
    assert disk_error(RuntimeError("I/O error: No space left on device (os error 28)")) == "No space left on device"
    assert disk_error(KeyError("step")) is None


@pytest.mark.parametrize("name", ["step", "scaler", "measured", "cpu_random_state"])
def test_a_checkpoint_without_a_part_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    settings = settings_of("budget.steps=6", "run_dir=run", "checkpoint_every=2")
    stop_after(settings, monkeypatch, step=3)
    path = Path("run/checkpoint.pt")
    state = torch.load(path, weights_only=True)
    del state[name]
    torch.save(state, path)
    expected = f"run/checkpoint.pt cannot be loaded .it has no {name}, or one of another type.: delete it to start"
    with pytest.raises(UserError, match=expected):
        training.train(settings, "")


def stop_after(settings: Settings, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Train to that step and no further."""
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            training.train(settings, "")


def test_what_killed_processes_left_is_removed() -> None:
    settings = settings_of("budget.steps=2", "run_dir=run")
    Path("run").mkdir()
    Path("run/.checkpoint.pt.somewhere.12345.part").write_bytes(b"half")
    training.train(settings, "")
    assert not list(Path("run").glob(".*"))
    save_checkpoint(Path("run"), torch.nn.Linear(1, 1), torch.optim.SGD(torch.nn.Linear(1, 1).parameters()))
    training.train(settings, "")  # finished, and killed before its checkpoint was deleted
    assert not Path("run/checkpoint.pt").exists()


def test_a_file_is_written_without_what_dead_writers_left_beside_it() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    path = Path("table.csv").absolute()
    with replacing(path) as beside:
        dead = beside.with_name(beside.name.replace(str(os.getpid()), str(ended.pid)))
        elsewhere = beside.with_name(f".table.csv.another-machine.{ended.pid}.part")
        for leftover in (dead, elsewhere):
            leftover.touch()
        with replacing(path) as again:
            again.write_text("new")
        beside.touch()
    assert not dead.exists() and elsewhere.exists()  # a number means nothing on another machine


def test_weights_and_biases_without_a_network_gives_up_soon(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setattr(records, "CONNECTING_SECONDS", 1)
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"Weights & Biases cannot start .*use wandb.mode=offline"):
        training.train(settings_of("budget.steps=2", "run_dir=run", "wandb.mode=online"), "")
    assert time.monotonic() - started < 30
    assert "connecting to Weights & Biases (at most 1 s)" in capfd.readouterr().err
