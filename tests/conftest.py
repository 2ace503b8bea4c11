"""How the tests share the cores: each worker computes on one of them, and so does every program that a test starts."""

from __future__ import annotations

import gc
import os
import signal
import threading
from pathlib import Path

import pytest

from vocabfold.limits import usable_cores

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, which reads it once
os.environ["MATPLOTLIBRC"] = str(Path(__file__).with_name("matplotlibrc"))
# What a shell starts in the background ignores Ctrl-C, and so would every program that a test interrupts.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
MOST_WORKERS = 8  # beyond these, workers wait for the longest tests


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Of ``-n auto``: one for each core that this process may use, none for a few named files, which need no start."""
    few_files = len(config.args) < 4 and all(Path(name.partition("::")[0]).is_file() for name in config.args)
    return 0 if few_files else min(MOST_WORKERS, usable_cores())


def pytest_configure(config: pytest.Config) -> None:
    """Where tests run: what only hands them out to workers is spared torch's seconds, for which these would wait."""
    if config.getoption("numprocesses", None):
        return
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its kernels, those of its own, in NumPy
    torch.set_num_threads(1)


def pytest_runtest_teardown() -> None:
    """A program that a test calls may have asked for two threads: left so, all that follow wait for each other."""
    import torch

    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Nothing imported so far is garbage: collections, which the tests of memory ask for, look at what comes later."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)  # configurations are made of many small objects, few of them garbage
    os.fsync = lambda _: None  # no test cuts the power, and a disk takes milliseconds for each of thousands


def pytest_runtest_logfinish() -> None:
    """What a test has left, such as modules that it was the first to import, is no garbage either."""
    gc.collect(1)
    gc.freeze()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the tiny corpus and a token cache of its own, as the current one."""
    from run_cases import write_corpus  # with all of Hydra, which most tests do not need

    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path
