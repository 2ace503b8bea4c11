"""Worker processes that end when the process that started them does, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor


def worker_processes(count: int) -> ProcessPoolExecutor:
    """A pool of ``count`` processes of which none outlives this one, whatever kills it."""
    # spawn, not fork: this process may hold threads (torch, tokenizers) that a fork would copy in mid-step
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_follow_parent)


def _follow_parent() -> None:
    """Runs first in a worker. Its Ctrl-C is the parent's to handle, and the parent's death its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # join waits on a pipe that the parent alone holds open: the kernel closes it after SIGKILL too
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
