"""Runs that more than one launcher starts: two torchrun agents, as on two machines, and submitit with two tasks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from run_cases import TINY, start, write_corpus
from vocabfold.runs import distributed
from vocabfold.runs.record import read_metrics

PLAIN = (*TINY, "log_every=1", "batch_size=4", "head=folded")


def losses(folder: Path) -> list[float]:
    return [line["train_loss"] for line in read_metrics(folder)]


@pytest.mark.slow
def test_two_torchrun_agents_are_two_machines(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    agent += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    command = [*agent, "-m", "vocabfold.train", *PLAIN, "parallel=fsdp", "run_dir=two"]
    environment = os.environ | {"VOCABFOLD_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    agents = [subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE) for _ in range(2)]
    for each in agents:
        _, said = each.communicate(timeout=280)
        assert each.returncode == 0, said.decode()
    assert start(tmp_path, "-m", "vocabfold.train", *PLAIN, "run_dir=one").returncode == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)


@pytest.mark.slow
def test_submitit_starts_the_processes_of_a_run(tmp_path: Path) -> None:
    """Its executor without Slurm: two tasks a run, each told its place by submitit alone."""
    write_corpus(tmp_path)
    launcher = ("--multirun", "hydra/launcher=local_executor", "hydra.launcher.tasks_per_node=2")
    done = start(tmp_path, "-m", "vocabfold.train", *launcher, *PLAIN, "parallel=fsdp", "run_dir=two")
    assert done.returncode == 0, done.stderr
    assert start(tmp_path, "-m", "vocabfold.train", *PLAIN, "run_dir=one").returncode == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
    assert json.loads((tmp_path / "two" / "row.json").read_text())["steps"] == 2


def test_a_process_that_submitit_started_beside_others_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    import submitit  # noqa: F401

    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    distributed.take_ranks_from_submitit()
    assert "WORLD_SIZE" not in os.environ  # no job of submitit's
    place: dict[str, Any] = {"EXECUTOR": "local", "LOCAL_JOB_ID": 7, "LOCAL_NTASKS": 2, "LOCAL_JOB_NUM_NODES": 1}
    place |= {"LOCAL_NODEID": 0, "LOCAL_GLOBALID": 1, "LOCAL_LOCALID": 1}
    for name, value in place.items():
        monkeypatch.setenv(f"SUBMITIT_{name}", str(value))
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that what is exported is taken back when the test ends
        monkeypatch.delenv(name)
    distributed.take_ranks_from_submitit()
    assert (os.environ["WORLD_SIZE"], os.environ["RANK"], os.environ["LOCAL_RANK"]) == ("2", "1", "1")
