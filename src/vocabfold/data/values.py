"""The values of a data configuration (a resolved conf/data node), checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vocabfold.errors import UserError


def required(data: Mapping[str, Any], key: str) -> Any:
    """The value of ``data.key``. Raises UserError where it is not set."""
    value = data.get(key)
    if value is None:
        raise UserError(f"data.{key} is not set; choose a corpus with data=NAME or set data.{key}=VALUE")
    return value


def count(data: Mapping[str, Any], key: str) -> int:
    """A whole number of 1 or more. Raises UserError for anything else."""
    value = whole(data, key)
    if value < 1:
        raise UserError(f"data.{key} must be 1 or more, not {value}")
    return value


def whole(data: Mapping[str, Any], key: str) -> int:
    """A whole number. Raises UserError for anything else."""
    value = required(data, key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"data.{key} must be a whole number, not {value!r}")
    return value


def number(data: Mapping[str, Any], key: str) -> float:
    """A number. Raises UserError for anything else."""
    value = required(data, key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"data.{key} must be a number, not {value!r}")
    return value
