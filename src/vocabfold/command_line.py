"""Command lines: an error that the user can mend is one line on stderr and exit status 2, never a traceback."""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from vocabfold.errors import UserError

LAUNCHER_EXTRAS = {"joblib": "launchers", "submitit_local": "launchers", "submitit_slurm": "launchers", "ray": "ray"}
# What a shell shows of programs that SIGINT and SIGPIPE ended.
INTERRUPTED_STATUS, BROKEN_PIPE_STATUS = 130, 141


class Interrupted(KeyboardInterrupt):
    """A program that stops because it was asked to: ``status`` is its exit status, the message says how to go on."""

    def __init__(self, message: str = "interrupted", status: int = INTERRUPTED_STATUS) -> None:
        super().__init__(message)
        self.status = status


class ArgumentParser(argparse.ArgumentParser):
    """One whose complaint is a UserError, and so one line."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; --help lists what there is")


def user_errors() -> tuple[type[BaseException], ...]:
    """UserError and, in a program that uses Hydra, the errors of Hydra and OmegaConf."""
    found: list[type[BaseException]] = [UserError]
    for module, name in (("hydra.errors", "HydraException"), ("omegaconf.errors", "OmegaConfBaseException")):
        if module in sys.modules:  # what raises them has loaded them, and other programs need not
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def one_line_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command's ``main`` accordingly; an interrupt from the keyboard ends with status 130."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except BrokenPipeError:  # `program | head`: the reader has what it wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed goes nowhere
            raise SystemExit(BROKEN_PIPE_STATUS) from None
        except KeyboardInterrupt as interrupt:
            tqdm.write(str(interrupt) or "interrupted", file=sys.stderr)
            raise SystemExit(getattr(interrupt, "status", INTERRUPTED_STATUS)) from None
        except Exception as error:
            if isinstance(error, user_errors()):
                exit_with(error)
            if is_out_of_memory(error):
                exit_with(UserError("out of memory: choose a smaller batch or model, or a machine with more"))
            if "on a slurm cluster" in str(error):  # submitit has no exception type for it
                exit_with(
                    UserError("Slurm's srun is not on the PATH: start this on a cluster, or choose another launcher")
                )
            raise

    return wrapped


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, or torch on any device, could not get the memory it wanted."""
    # torch's CPU allocator raises a plain RuntimeError; its CUDA one a class that programs without torch need not load
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error))
    )


def exit_with(error: BaseException) -> NoReturn:
    """Print ``error`` as one line, below any progress bar, and leave with status 2."""
    module = sys.modules["__main__"].__spec__
    program = f"python -m {module.name.removesuffix('.__main__')}" if module else Path(sys.argv[0]).name
    tqdm.write(f"{program}: {one_line(error)}", file=sys.stderr)
    raise SystemExit(2) from None


def one_line(error: BaseException | None) -> str:
    """What was wrong and what to do, from an error and the causes that Hydra chains to it, without line breaks."""
    parts: list[str] = []
    while error is not None and isinstance(error, user_errors()):
        text = " ".join(str(error).split())
        if not isinstance(error, UserError):
            if (explained := explain_config_error(error)) is not None:
                return explained
            text = text.partition(" full_key:")[0]
            if key := getattr(error, "full_key", None):
                text = f"{key}: {text}"
        if text and not any(text in part for part in parts):
            parts.append(text)
        error = error.__cause__
    return ": ".join(parts)


def explain_config_error(error: Any) -> str | None:
    """Plain words for the errors of Hydra and OmegaConf that a command line meets most; None for any other."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return missing_option(error)
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: write key=value, and 'key=\"value\"' for a value with , = or ["
    if isinstance(error, (ConfigAttributeError, ConfigKeyError)) and error.full_key:
        return unknown_key(error)
    return None


def missing_option(error: Any) -> str:
    """Of a group (head=nonesuch), or of a launcher whose plugin is not installed."""
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    if group == "hydra/launcher" and option in LAUNCHER_EXTRAS:
        return f"the launcher {option} is not installed: pip install 'vocabfold[{LAUNCHER_EXTRAS[option]}]'"
    return f"there is no {group}={option}: choose one of {', '.join(error.options or ['those in conf/'])}"


def unknown_key(error: Any) -> str:
    """Of an override or a config file, with the key beside it that looks most like it."""
    near = difflib.get_close_matches(str(error.key), [str(key) for key in error.parent_node or ()], n=1)
    prefix = re.sub(r"[^.]*$", "", str(error.full_key))
    meant = f"did you mean {prefix}{near[0]}? " if near else ""
    return f"unknown key {error.full_key}: {meant}--help lists the keys"
