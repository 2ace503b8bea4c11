"""Files that are either whole or not there: write beside, fsync, rename."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from vocabfold.errors import UserError

MOST_YAML_BYTES, MOST_YAML_DEPTH = 1 << 18, 20
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same in C, ten times as fast, where it was built


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty file beside ``path``; when the block ends well, what was written there is synced and takes its
    place, with the permissions that the umask gives a new file.

    If the block raises (or the process dies) ``path`` keeps its old content. Parent folders are made. What a process of
    this machine that has died left beside ``path`` is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    beside = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.part")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # a writer may put another file here, that only its owner may read
        yield beside
        beside.chmod(mode)
        with beside.open("rb+") as written:
            os.fsync(written.fileno())
        beside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)
    finally:
        beside.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove the files beside ``path`` that processes of this machine were writing in its place when they died."""
    beginning = f".{path.name}.{platform.node()}."
    for beside in path.parent.iterdir():
        number = beside.name.removeprefix(beginning).removesuffix(".part")
        if beside.name == f"{beginning}{number}.part" and number.isdecimal() and not is_alive(int(number)):
            beside.unlink(missing_ok=True)


def is_alive(process_number: int) -> bool:
    """Whether this machine runs a process of that number."""
    try:
        os.kill(process_number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, and is another user's
        return True
    return True


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, 64 hex digits. Asked again for the same size and time of change it is not read
    again. Raises UserError for one that cannot be read."""
    try:
        status = path.stat()
        return _file_sha256(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); check its permissions") from error


@functools.lru_cache(maxsize=1024)
def _file_sha256(path: Path, _size_bytes: int, _modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8) as a whole."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a small YAML file. Raises UserError where it holds anything else.

    An alias, which can make a few lines as large as memory, and deep nesting, which is slow to read, are refused before
    anything is built: no file that this package writes has them.
    """
    try:
        if (size := path.stat().st_size) > MOST_YAML_BYTES:
            raise UserError(f"{path} has {size} bytes: no run writes more than {MOST_YAML_BYTES}")
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, YAML_LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{path} holds a YAML alias, which no run writes: write its values out")
            if depth > MOST_YAML_DEPTH:
                raise ValueError("it is nested too deeply")
        content = yaml.load(text, YAML_LOADER)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged: delete the run folder and train again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no keys): delete the run folder and train again")
    return content
