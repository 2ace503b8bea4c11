"""Do the tests notice? Puts one fault after the other of faults.py into a copy of this tree and runs the tests named.

    python tests/mutations.py [--quick] [--only WORD] [--tree FOLDER] [--jobs NUMBER]

Prints a line for each fault: caught, NOT caught, or what is wrong with the fault itself. Exit status 1 unless every
fault is caught. Without a fault the same tests must pass, which is seen to first. Each job has a copy of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import NoReturn

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import hydra  # noqa: F401  these are slow to import: once here, and every fault's own process has them
import hypothesis  # noqa: F401
import pandas  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import torch

from faults import FAULTS, Fault, place_of, sources_of

REPOSITORY = Path(__file__).resolve().parents[1]
LONGEST_SECONDS = 300  # a fault may make a loop endless
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", ".*_cache", ".hypothesis", "wandb")
PASSED, FAILED = 0, 1  # pytest's exit status; any other says that no test ran
COPY = REPOSITORY  # of each job the tree that it may spoil


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one fault of each file, and no run without a fault")
    parser.add_argument("--only", default="", metavar="WORD", help="faults whose file, text or tests hold this word")
    parser.add_argument("--tree", type=Path, default=REPOSITORY, metavar="FOLDER", help="another tree to try them on")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=cores, metavar="NUMBER", help="at a time (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.path = [place for place in sys.path if Path(place or ".").resolve() != REPOSITORY / "tests"]
    faults = [fault for fault in FAULTS if options.only in f"{fault.file} {fault.old} {fault.new} {fault.tests}"]
    if options.quick:
        faults = list({fault.file: fault for fault in reversed(faults)}.values())[::-1]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copies = multiprocessing.SimpleQueue()
        for job in range(options.jobs):
            copy = Path(folder) / str(job) / "tree"
            shutil.copytree(options.tree, copy, ignore=_left_out, symlinks=True)
            copies.put(copy)
        # Not multiprocessing's own pool, whose processes may start none, as some tests do.
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork"), _take, (copies,)) as pool:
            if not options.quick:
                _check_without_a_fault(pool, sorted({name for fault in faults for name in fault.tests.split()}))
            found = list(pool.map(_try, faults))
    print(f"{sum(found)} of {len(found)} faults are caught, in {time.monotonic() - started:.0f} s")
    sys.exit(0 if all(found) else 1)


def _take(copies: SimpleQueue[Path]) -> None:
    """Give this job its tree."""
    global COPY
    COPY = copies.get()


def _left_out(folder: str, names: list[str]) -> set[str]:
    # src/vocabfold/runs is code, results/runs is not
    return {name for name in LEFT_OUT(folder, names) if name != "runs" or Path(folder).name == "results"}


def _check_without_a_fault(pool: Executor, tests: list[str]) -> None:
    started = time.monotonic()
    for name, (status, last, _) in zip(tests, pool.map(_run, [[name] for name in tests]), strict=True):
        if status == FAILED:
            sys.exit(f"{name} fails without a fault: {last}")
        if status != PASSED:
            sys.exit(
                f"no test of {name} runs here ({last}): install what it needs, or leave its faults out with --only"
            )
    print(f"{len(tests)} test files pass without a fault in {time.monotonic() - started:.0f} s", flush=True)


def _try(fault: Fault) -> bool:
    """Whether the tests named notice ``fault``; the copy is whole again afterwards."""
    path = place_of(fault, sources_of(COPY))
    label = f"{fault.file}: {fault.old.strip()} -> {fault.new.strip()}".replace("\n", " ")
    if path is None:
        print(f"NOT FOUND   {label}", flush=True)
        return False
    content = path.read_text(encoding="utf-8")
    try:
        path.write_text(content.replace(fault.old, fault.new), encoding="utf-8")
        status, last, seconds = _run(fault.tests.split())
    finally:
        path.write_text(content, encoding="utf-8")
        Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)
    said = {PASSED: "NOT caught  ", FAILED: "caught      "}.get(status, "NO TEST RAN ")
    print(f"{said}{label}   [{seconds:.0f} s, {last}]", flush=True)
    return status == FAILED


def _run(tests: list[str]) -> tuple[int, str, float]:
    """(pytest's exit status, its last failure or last line, seconds), in a process that has torch already."""
    start = time.monotonic()
    printed = COPY.parent / "printed.txt"
    paths = [f"tests/{name}" for name in tests if (COPY / "tests" / name).exists()]  # an older tree may lack some
    child = os.fork()
    if child == 0:
        os.setsid()
        _become_pytest(paths, printed)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - start > LONGEST_SECONDS * len(paths):
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return FAILED, f"no end within {LONGEST_SECONDS * len(paths)} s", time.monotonic() - start
        time.sleep(0.05)
    lines = printed.read_text(encoding="utf-8", errors="replace").splitlines() or ["no output"]
    failed = [line.partition(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return os.waitstatus_to_exitcode(status), (failed or lines)[-1], time.monotonic() - start


def _become_pytest(paths: list[str], printed: Path) -> NoReturn:
    """Run these tests of the copy in this process, which has imported nothing of it, and end it."""
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(COPY)
    os.environ["PYTHONPATH"] = f"{COPY / 'src'}{os.pathsep}{COPY}"  # of the programs that tests start
    os.environ["VOCABFOLD_CACHE"] = str(COPY / "cache")
    sys.path[:0] = [str(COPY / "src"), str(COPY), str(COPY / "tests")]
    options = ["-n", "0", "-x", "-q", "--tb=no", "-m", "not slow", "--durations=0", "--durations-min=1000"]
    status = pytest.main([*options, *paths])
    sys.stdout.flush()
    os._exit(int(status))


if __name__ == "__main__":
    main()
