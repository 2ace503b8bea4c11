"""Freed memory is kept: a training step takes far fewer new pages from the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from torch.nn import functional as F
from vocabfold.measure.allocator import keep_freed_memory

{keep}
hidden = torch.randn(512, 16, requires_grad=True)
weight = torch.randn(20_000, 16, requires_grad=True)
targets = torch.randint(20_000, (512,))

def step():
    F.cross_entropy(hidden @ weight.t(), targets).backward()

step()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(keep: str) -> int:
    program = PROGRAM.format(keep=keep)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_training_steps_reuse_their_pages() -> None:
    by_default = page_faults("")
    if by_default < 1000:
        pytest.skip("this system does not take large blocks back")
    assert page_faults("assert keep_freed_memory()") < 0.5 * by_default
