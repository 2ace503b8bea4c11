"""What a command line prints as a single line."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(Exception):
    """What was wrong and what to do, in one line. Command lines print it without a traceback and exit with status 2."""


class OutOfReach(UserError):
    """A compression that no setting of a method reaches."""


def needed(package: str, purpose: str) -> ModuleType:
    """The module of a package that only some parts want, loaded when they are used. Raises UserError without it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise UserError(f"{purpose} needs the package {package}: pip install {package}") from error
