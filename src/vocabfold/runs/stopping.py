"""Ctrl-C and SIGTERM end a run between two steps, so that it can leave a checkpoint of where it stood."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from vocabfold.command_line import Interrupted

# A launcher passes on what its processes were sent already, such as Ctrl-C to all of them: that is still one request.
SAME_REQUEST_SECONDS = 1.0
STATUS_OF_SIGNAL = {signal.SIGINT: 130, signal.SIGTERM: 143}  # as a shell shows them


class StopRequest:
    """Whether somebody has asked the run to stop: ``status`` is its exit status then, None before."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.asked_at = -math.inf

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. One that is repeated later ends the program at once."""
        if self.status is None:
            self.status, self.asked_at = STATUS_OF_SIGNAL[signal.Signals(number)], time.monotonic()
            # not through sys.stderr, which may be in the middle of a write
            os.write(2, b"\nstopping after this step, with a checkpoint (once more: at once)\n")
        elif time.monotonic() - self.asked_at > SAME_REQUEST_SECONDS:
            raise Interrupted("interrupted again: the same command goes on from the last checkpoint", self.status)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch Ctrl-C and SIGTERM for the time of the block, where this thread may: only the main one can."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in STATUS_OF_SIGNAL}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup and a shell's & have it
            signal.signal(number, request.receive)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
