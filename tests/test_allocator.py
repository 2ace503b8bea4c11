"""Freed memory is kept: the second of two equal steps takes no new pages from the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from vocabfold.allocator import keep_freed_memory
KEEP
def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(64 * 2**20 // 4).add_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults_of_a_step()
print(faults_of_a_step())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_second_step_faults_no_pages() -> None:
    def faults(keep: str) -> int:
        program = PROGRAM.replace("KEEP", keep)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
        return int(done.stdout)

    if faults("assert True") < 1000:
        pytest.skip("this system does not give large blocks back")
    assert faults("assert keep_freed_memory()") < 100
