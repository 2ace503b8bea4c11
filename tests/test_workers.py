"""Worker processes end with the process that started them, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOKENISE = """
import itertools
from vocabfold.data.tokenise import _encoded_by_workers
if __name__ == "__main__":
    for _ in _encoded_by_workers(itertools.repeat(["the cat saw a dog"]), "gpt2", 2):
        print("working", flush=True)
"""
DRAW = """
import itertools
from vocabfold.data.batches import BatchPlan
from vocabfold.data.drawing import classes_of
from vocabfold.data.shapes import Shapes
if __name__ == "__main__":
    shapes = Shapes("shapes", classes_of({}), 16, num_train=1000, num_valid=1, seed=0, workers=2)
    batches = shapes.batches("train", BatchPlan(1, 2, seed=0))
    for index in itertools.count():
        batches.batch(index)
        print("working", flush=True)
"""


def running_children(number: int) -> set[int]:
    """The process numbers of the children of one process."""
    return {int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()}


def is_running(number: int) -> bool:
    """Whether there is such a process, and not only its exit status."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="processes are found through Linux's /proc")
@pytest.mark.parametrize(
    ("program", "number"),
    [
        (TOKENISE, signal.SIGKILL),
        (TOKENISE, signal.SIGTERM),
        pytest.param(DRAW, signal.SIGTERM, marks=pytest.mark.slow),  # the same pool, but three starts of torch
    ],
)
def test_no_worker_outlives_its_parent(tmp_path: Path, program: str, number: signal.Signals) -> None:
    (tmp_path / "program.py").write_text(program)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "working\n"
        children = running_children(process.pid)
        assert len(children) >= 2
        os.kill(process.pid, number)
    deadline = time.monotonic() + 20
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [child for child in children if is_running(child)]
    for child in left:
        os.kill(child, signal.SIGKILL)
    assert not left
