"""Which machine and which code a figure was measured with, and the floors that the machine sets."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from vocabfold.limits import memory_bytes, usable_cores

BYTES_PER_MIB = 2**20
BYTES_PER_GIB = 2**30
CPU_INFORMATION = Path("/proc/cpuinfo")
GIT_TIMEOUT_SECONDS = 5.0
# The folders of a checkout that decide what is measured: tables and pages that a program rewrites are no part of it.
MEASURING = ("src", "conf", "experiments")
REPETITIONS = 5
COMMIT_VARIABLE = "VOCABFOLD_COMMIT"  # tells the commit of a copy of the work tree that git knows nothing of


@functools.cache
def hardware() -> str:
    """One line: CPU model, usable cores, memory in GiB, and the GPUs if there are any."""
    parts = [_cpu_model(), f"{usable_cores()} cores", f"{memory_bytes() / BYTES_PER_GIB:.0f} GiB"]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        parts += [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return ", ".join(parts)


def _cpu_model() -> str:
    with suppress(OSError):
        for line in CPU_INFORMATION.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown CPU"


@functools.cache
def code_commit(directory: Path = Path(__file__).parent) -> str:
    """Short git hash of the work tree around `directory`, with "+" where a tracked file of MEASURING differs.

    Outside git, as in a copy without its .git folder on a machine that measures, what the environment variable
    VOCABFOLD_COMMIT says, else "unknown".
    Asked once a process: what a run imported is what stood there when it began.
    """
    if (commit := _git(directory, "rev-parse", "--short", "HEAD")) is None:
        return os.environ.get(COMMIT_VARIABLE, "").strip() or "unknown"
    root = Path(_git(directory, "rev-parse", "--show-toplevel") or directory)
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *MEASURING)
    return commit + ("+" if changed else "")


def _git(directory: Path, *arguments: str) -> str | None:
    """What git answers in `directory`; None where it does not."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_SECONDS,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def torch_version() -> str:
    """Version of torch with its build, as in 2.13.0+cpu."""
    return str(torch.__version__)


def origin() -> dict[str, str]:
    """The columns that end a table's rows: where, with which code and by which command they were measured."""
    command = shlex.join(["python", "-m", "experiments", *sys.argv[1:]])
    return {"hardware": hardware(), "torch": torch_version(), "commit": code_commit(), "command": command}


def matrix_rate_flops_per_second(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...] = (512, 1024, 2048)
) -> float:
    """Best rate of square matrix products [n, n] x [n, n] over `sizes`, 2 n^3 operations each.

    What the machine reached, and so a lower bound of what it can do. `dtype` is a floating point type.
    """

    def rate(size: int) -> float:
        left = torch.randn(size, size, device=device, dtype=dtype)
        right = torch.randn(size, size, device=device, dtype=dtype)
        product = torch.empty(size, size, device=device, dtype=dtype)
        return 2 * size**3 / least_seconds(lambda: torch.mm(left, right, out=product), device)

    with torch.no_grad():
        return max(rate(size) for size in sizes)


def memory_bandwidth_bytes_per_second(device: torch.device, size_bytes: int = 2**28) -> float:
    """Best rate of copying `size_bytes` within the device's memory, bytes read plus bytes written.

    A lower bound too. The default of 256 MiB is larger than the caches of common processors.
    """
    source = torch.ones(size_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size_bytes / least_seconds(lambda: target.copy_(source), device)


def synchronize(device: torch.device) -> None:
    """Wait for the work that was given to `device`; nothing to do on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def least_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The shortest of REPETITIONS runs, after one that does not count."""
    run()
    least = float("inf")
    for _ in range(REPETITIONS):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        least = min(least, time.perf_counter() - start)
    return least
