"""Command lines: an error that the user can mend is one line on stderr and exit status 2, never a traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from vocabfold.errors import UserError

USER_ERRORS = (UserError, HydraException, OmegaConfBaseException)


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

    return wrapped


def exit_with(error: BaseException) -> NoReturn:
    """Print ``error`` as one line and leave with status 2."""
    module = sys.modules["__main__"].__spec__
    program = f"python -m {module.name}" if module else Path(sys.argv[0]).name
    print(f"{program}: {one_line(error)}", file=sys.stderr)
    raise SystemExit(2) from None


def one_line(error: BaseException | None) -> str:
    """The words of an error and of the causes that Hydra chains to it, without line breaks or its search path."""
    parts: list[str] = []
    while isinstance(error, USER_ERRORS):
        text = " ".join(str(error).split()).partition(" Config search path:")[0].partition(" object_type=")[0]
        if text and not any(text in part for part in parts):
            parts.append(text)
        error = error.__cause__
    return ": ".join(parts)
