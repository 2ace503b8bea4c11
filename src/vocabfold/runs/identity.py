"""Which run a configuration is: the hash of all that decides its result, the content of its text included.

It is the key of the run's row in every table, stands in its config.yaml and ends the name of its folder. So the same
command finds the same run again and goes on or skips it, and neither another setting nor an edited text does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vocabfold.data.content import content_sha256
from vocabfold.errors import UserError
from vocabfold.files import read_yaml_mapping
from vocabfold.runs.settings import Settings
from vocabfold.runs.tables import RESULTS

RUN_DIGITS = 10
CONTENT_DIFFERS = "its text had another content"
# Where and how a run is recorded, and how fast: nothing that changes its result.
OUTSIDE = ("run", "run_dir", "wandb", "log_every", "checkpoint_every", "checkpoint_minutes")
# Of the data: how it is kept, and what it is called; what it holds is told by its hash.
KEPT = ("cache_dir", "workers", "on_device", "store")
OUTSIDE_DATA = (*KEPT, "label", "train", "valid", "source")


def identify(settings: Settings) -> None:
    """Give ``settings`` their ``run`` and, where they name no folder, ``run_dir``. Reads the text.

    Raises UserError for data that cannot be read and where the folder belongs to another run.
    """
    settings.run = run_of(settings, content_sha256(settings.data))
    if not settings.run_dir:
        folder = RESULTS / "runs" / settings.corpus / settings.experiment
        settings.run_dir = str(folder / f"{described(settings)}-{settings.run}")
    refuse_other_run(settings)


def run_of(settings: Settings, content: Mapping[str, str]) -> str:
    """The hash of ``settings`` on a text whose parts have these SHA-256 sums ({train: .., valid: ..}).

    A setting that has its default in code is left out: an option that is added later, and off, renames no run.
    """
    chosen = {key: value for key, value in _chosen(settings).items() if key not in OUTSIDE}
    chosen["data"] = {key: value for key, value in settings.data.items() if key not in OUTSIDE_DATA} | dict(content)
    plain = json.dumps(chosen, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()[:RUN_DIGITS]


def described(settings: Settings) -> str:
    """A run in a few words for a person, to begin the name of its folder with."""
    size = settings.head.partition.group_size
    parts = [settings.model.name, settings.head.name + (f"-size{size}" if size else "")]
    parts += [settings.embedding.name] if settings.embedding.name != "dense" else []
    parts += [settings.start.type] if settings.start.type != "none" else []
    return "-".join([*parts, f"seed{settings.seed}"])


def refuse_other_run(settings: Settings) -> None:
    """Raise UserError where ``settings.run_dir`` holds a run that is not ``settings.run``, begun or finished."""
    path = Path(settings.run_dir) / "config.yaml"
    if not path.is_file():
        return
    kept = read_yaml_mapping(path)
    if kept.get("run") != settings.run:
        raise UserError(
            f"{settings.run_dir} holds another run ({_difference(kept, dataclasses.asdict(settings))}): "
            "choose another run_dir, or delete that folder"
        )


def _chosen(settings: Any) -> dict[str, Any]:
    """The settings of a dataclass, those within it included, that are not what its code has as a default."""
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            if inner := _chosen(value):
                chosen[field.name] = inner
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        if value != default:
            is_folder = field.metadata.get("folder") and value
            chosen[field.name] = _run_in(Path(value)) if is_folder else value
    return chosen


def _run_in(folder: Path) -> str:
    """The run that a folder holds, wherever it lies; the folder's own name where it does not tell."""
    path = folder / "config.yaml"
    return str(read_yaml_mapping(path).get("run") or folder) if path.is_file() else str(folder)


def _difference(kept: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str:
    """The first setting in which two configurations differ, for a person."""
    for key, value in wanted.items():
        if (not prefix and key in OUTSIDE) or (prefix == "data." and key in KEPT):
            continue
        before = kept.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            if (inner := _difference(before, value, f"{prefix}{key}.")) != CONTENT_DIFFERS:
                return inner
        elif before != value:
            return f"its {prefix}{key} is {before}, here it is {value}"
    return CONTENT_DIFFERS
