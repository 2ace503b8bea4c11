"""Freed memory is kept: a training step takes far fewer new pages from the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from torch.nn import functional as F
from vocabfold.measure.allocator import keep_freed_memory

# Logits of 40 MB: of blocks below 32 MB glibc learns by itself to keep some.
hidden = torch.randn(512, 16, requires_grad=True)
weight = torch.randn(20_000, 16, requires_grad=True)
targets = torch.randint(20_000, (512,))

def step():
    F.cross_entropy(hidden @ weight.t(), targets).backward()

def page_faults():
    step()
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

by_default = page_faults()
assert keep_freed_memory()
print(by_default, page_faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_training_steps_reuse_their_pages() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    by_default, kept = map(int, done.stdout.split())
    if by_default < 400:
        pytest.skip("this system does not take large blocks back")
    assert kept < 0.5 * by_default
