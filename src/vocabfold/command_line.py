"""Command lines: an error that the user can mend is one line on stderr and exit status 2, never a traceback."""

from __future__ import annotations

import argparse
import difflib
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from vocabfold.errors import UserError

USER_ERRORS = (UserError, HydraException, OmegaConfBaseException)
LAUNCHER_EXTRAS = {"joblib": "launchers", "submitit_local": "launchers", "submitit_slurm": "launchers", "ray": "ray"}


class ArgumentParser(argparse.ArgumentParser):
    """One whose complaint is a UserError, and so one line."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; --help lists what there is")


def one_line_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command's ``main`` accordingly; an interrupt from the keyboard ends with status 130."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except USER_ERRORS as error:
            exit_with(error)
        except KeyboardInterrupt:
            print("interrupted: the same command continues", file=sys.stderr)
            raise SystemExit(130) from None
        except RuntimeError as error:
            if "on a slurm cluster" not in str(error):  # submitit has no exception type for it
                raise
            exit_with(UserError("Slurm's srun is not on the PATH: start this on a cluster, or choose another launcher"))

    return wrapped


def exit_with(error: BaseException) -> NoReturn:
    """Print ``error`` as one line and leave with status 2."""
    module = sys.modules["__main__"].__spec__
    program = f"python -m {module.name}" if module else Path(sys.argv[0]).name
    print(f"{program}: {one_line(error)}", file=sys.stderr)
    raise SystemExit(2) from None


def one_line(error: BaseException | None) -> str:
    """What was wrong and what to do, from an error and the causes that Hydra chains to it, without line breaks."""
    parts: list[str] = []
    while isinstance(error, USER_ERRORS):
        if isinstance(error, MissingConfigException) and error.missing_cfg_file:
            return missing_option(error)
        if isinstance(error, OverrideParseException):
            return f"cannot read {error.override!r}: write key=value, and 'key=\"value\"' for a value with , = or ["
        if isinstance(error, (ConfigAttributeError, ConfigKeyError)) and error.full_key:
            return unknown_key(error)
        text = " ".join(str(error).split()).partition(" full_key:")[0]
        if isinstance(error, OmegaConfBaseException) and error.full_key:
            text = f"{error.full_key}: {text}"
        if text and text not in parts:
            parts.append(text)
        error = error.__cause__
    return ": ".join(parts)


def missing_option(error: MissingConfigException) -> str:
    """Of a group (head=nonesuch), or of a launcher whose plugin is not installed."""
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    if group == "hydra/launcher" and option in LAUNCHER_EXTRAS:
        return f"the launcher {option} is not installed: pip install 'vocabfold[{LAUNCHER_EXTRAS[option]}]'"
    return f"there is no {group}={option}: choose one of {', '.join(error.options or ['those in conf/'])}"


def unknown_key(error: OmegaConfBaseException) -> str:
    """Of an override or a config file, with the key beside it that looks most like it."""
    near = difflib.get_close_matches(str(error.key), [str(key) for key in error.parent_node or ()], n=1)
    prefix = re.sub(r"[^.]*$", "", str(error.full_key))
    meant = f"did you mean {prefix}{near[0]}? " if near else ""
    return f"unknown key {error.full_key}: {meant}--help lists the keys"
