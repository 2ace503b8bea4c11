"""Timing what another process does: settings of a whole process, such as its allocator's, can differ in one run."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from vocabfold.errors import UserError


class OtherProcess:
    """A fresh process that builds a mapping of calls with ``build(*arguments)`` and runs them when asked to.

    ``build`` must be importable there, its arguments and the calls' results must pickle. Raises UserError where the
    process ends by itself. Use it as a context: the process ends with it.
    """

    def __init__(self, build: Callable[..., Mapping[str, Callable[[], Any]]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, name: str) -> Any:
        """The result of the call ``name``; an error there is raised here."""
        try:
            self._connection.send(name)
            result = self._connection.recv()
        except (EOFError, OSError) as error:
            raise UserError(f"the process that runs {name!r} has ended: perhaps it ran out of memory") from error
        if isinstance(result, BaseException):
            raise result
        return result

    def __enter__(self) -> OtherProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()


def _serve(connection: Connection, build: Callable[..., Mapping[str, Callable[[], Any]]], arguments: Any) -> None:
    try:
        calls = build(*arguments)
    except Exception as error:
        connection.send(error)
        return
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        try:
            result = calls[name]()
        except Exception as error:
            result = error
        connection.send(result)
