"""A run's folder while a process works in it: one process at a time, swept clean first, and one line where the disk
does not take what is written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vocabfold.errors import UserError

# What the owner of a disk can mend: it is full, or it may not be written.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Make ``folder`` and keep every other process out of it for the time of the block.

    The lock is on the folder itself and the kernel's: it leaves no file behind, and ends with the process, however that
    dies. What a killed process was writing when it died is removed. Raises UserError where another process works in
    ``folder`` or it cannot be made or, in the block, written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot make the run folder {folder} ({error.strerror}): set run_dir=FOLDER") from error
    try:
        take(lock, folder)
        with one_line_disk_errors(folder):
            sweep(folder)
            yield
    finally:
        os.close(lock)


def take(lock: int, folder: Path) -> None:
    """Lock an open folder, or raise UserError where another process has. A file system without locks is let pass."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"another process is at work in the run folder {folder}: wait for it or end it, or set run_dir=FOLDER"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise


def sweep(folder: Path) -> None:
    """Remove half-written files, whose writers are dead: nobody else works in ``folder``."""
    for leftover in folder.glob(".*.part"):
        leftover.unlink(missing_ok=True)


@contextmanager
def one_line_disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk, or one that may not be written, into a UserError that names ``folder``."""
    try:
        yield
    except Exception as error:
        if (reason := disk_error(error)) is None:
            raise
        with contextlib.suppress(OSError):
            sweep(folder)
        raise UserError(
            f"cannot write to the run folder {folder} ({reason}): mend that and repeat the command, "
            "which goes on from the last checkpoint, or set run_dir=FOLDER"
        ) from error


def disk_error(error: BaseException | None) -> str | None:
    """What the disk did not allow, in the system's words, from an error or those that it came from; None: nothing."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error.strerror
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):  # safetensors and W&B tell the words only
            if os.strerror(number) in str(error):
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None
