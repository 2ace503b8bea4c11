"""Do the tests notice? Puts one fault after the other of faults.py into a copy of this tree and runs the tests named.

    python tests/mutations.py [--quick] [--only WORD] [--tree FOLDER]

Prints a line for each fault: caught, NOT caught, or what is wrong with the fault itself. Exit status 1 unless every
fault is caught. Without a fault the same tests must pass, which is seen to first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import FAULTS, Fault

REPOSITORY = Path(__file__).resolve().parents[1]
LONGEST_SECONDS = 300  # a fault may make a loop endless
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", ".hypothesis", "wandb")
PASSED, FAILED = 0, 1  # pytest's exit status; any other says that no test ran


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one fault of each file, and no run without a fault")
    parser.add_argument("--only", default="", metavar="WORD", help="faults whose file, text or tests hold this word")
    parser.add_argument("--tree", type=Path, default=REPOSITORY, metavar="FOLDER", help="another tree to try them on")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if options.only in f"{fault.file} {fault.old} {fault.new} {fault.tests}"]
    if options.quick:
        faults = list({fault.file: fault for fault in reversed(faults)}.values())[::-1]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(options.tree, copy, ignore=_left_out, symlinks=True)
        if not options.quick:
            _check_without_a_fault(copy, sorted({name for fault in faults for name in fault.tests.split()}))
        found = [_try(fault, copy) for fault in faults]
    print(f"{sum(found)} of {len(found)} faults are caught")
    sys.exit(0 if all(found) else 1)


def _left_out(folder: str, names: list[str]) -> set[str]:
    # src/vocabfold/runs is code, results/runs is not
    return {name for name in LEFT_OUT(folder, names) if name != "runs" or Path(folder).name == "results"}


def _check_without_a_fault(copy: Path, tests: list[str]) -> None:
    status, last, seconds = _run(copy, tests)
    if status != PASSED:
        sys.exit(f"the tests fail without a fault: {last}")
    print(f"{len(tests)} test files pass without a fault in {seconds:.0f} s")


def _try(fault: Fault, copy: Path) -> bool:
    """Whether the tests named notice ``fault``; the copy is whole again afterwards."""
    path = _place_of(fault, copy)
    label = f"{fault.file}: {fault.old.strip()} -> {fault.new.strip()}".replace("\n", " ")
    if path is None:
        print(f"NOT FOUND   {label}", flush=True)
        return False
    content = path.read_text(encoding="utf-8")
    try:
        path.write_text(content.replace(fault.old, fault.new), encoding="utf-8")
        status, last, seconds = _run(copy, fault.tests.split())
    finally:
        path.write_text(content, encoding="utf-8")
    said = {PASSED: "NOT caught  ", FAILED: "caught      "}.get(status, "NO TEST RAN ")
    print(f"{said}{label}   [{seconds:.0f} s, {last}]", flush=True)
    return status == FAILED


def _place_of(fault: Fault, copy: Path) -> Path | None:
    """The file that holds the text once: one of that name, else, where it was renamed, the only one that has it."""
    paths = [path for room in ("src", "experiments") for path in (copy / room).rglob("*.py")]
    having = [path for path in paths if path.read_text(encoding="utf-8").count(fault.old) == 1]
    named = [path for path in having if path.as_posix().endswith("/" + fault.file)]
    same_name = [path for path in having if path.name == Path(fault.file).name]
    for found in (named, same_name, having):
        if len(found) == 1:
            return found[0]
    return None


def _run(copy: Path, tests: list[str]) -> tuple[int, str, float]:
    """(pytest's exit status, its last failure or last line, seconds)."""
    environment = os.environ | {"PYTHONPATH": f"{copy / 'src'}{os.pathsep}{copy}", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "VOCABFOLD_CACHE": str(copy / "cache")}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "--tb=no", "-m", "not slow", "--durations=0"]
    paths = [f"tests/{name}" for name in tests]  # an older tree may lack some
    start = time.monotonic()
    try:
        done = subprocess.run(
            [*command, "--durations-min=1000", *(name for name in paths if (copy / name).exists())],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LONGEST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return FAILED, f"no end within {LONGEST_SECONDS} s", time.monotonic() - start
    lines = done.stdout.splitlines() or done.stderr.splitlines() or ["no output"]
    failed = [line.partition(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, (failed or lines)[-1], time.monotonic() - start


if __name__ == "__main__":
    main()
