"""The C library's memory allocator, told to keep what a training step frees for the next step."""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let glibc reuse large freed blocks instead of handing them back to the system; return whether it does.

    Logits of N x V are hundreds of megabytes. By default glibc maps them afresh in every step, and the kernel clears
    each page again: half the time of a full softmax on a CPU goes there. The price is a larger resident size of the
    process, as with any caching allocator. Without glibc (macOS, Windows, musl) nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
