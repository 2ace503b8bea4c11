"""What experiments that measure share: their options, the text, the device, the model, and one identity for a table."""

from __future__ import annotations

import hashlib
import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from vocabfold.data.content import content_sha256
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.machine import hardware
from vocabfold.measure.allocator import keep_freed_memory
from vocabfold.models.build import ModelSettings
from vocabfold.runs.compose import composed_settings
from vocabfold.runs.distributed import choose_device
from vocabfold.runs.identity import OUTSIDE_DATA, RUN_DIGITS
from vocabfold.runs.record import beside_others, collect, finished_runs
from vocabfold.runs.settings import Settings
from vocabfold.runs.tables import RESULTS, read_rows

COST = RESULTS / "cost"  # tables of what depends on no text
SETTINGS_HELP = "settings of training, which choose the text: data=NAME data.KEY=VALUE (default: the embedded stories)"


def add_settings(parser: ArgumentParser) -> None:
    """KEY=VALUE arguments as vocabfold.train takes them."""
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help=SETTINGS_HELP)


def add_rounds(parser: ArgumentParser, rounds: int) -> None:
    """``--rounds``: how often interleaved methods take turns."""
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved (default %(default)s)")


def add_sizes(parser: ArgumentParser, model: ModelSettings, batch_size: int) -> None:
    """Options for the sizes of ``model_of`` and of its batch, with the defaults given."""
    parser.add_argument("--hidden-size", type=int, default=model.hidden_size, help="default %(default)s")
    parser.add_argument("--num-layers", type=int, default=model.num_layers, help="default %(default)s")
    parser.add_argument("--num-heads", type=int, default=model.num_heads, help="default %(default)s")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="default %(default)s")
    parser.add_argument("--sequence-length", type=int, default=model.max_positions, help="default %(default)s")


def model_of(arguments: Namespace) -> ModelSettings:
    """The model that the options of ``add_sizes`` describe."""
    return ModelSettings(
        hidden_size=arguments.hidden_size,
        num_layers=arguments.num_layers,
        num_heads=arguments.num_heads,
        max_positions=arguments.sequence_length,
    )


def at_least_one(arguments: Namespace, *names: str) -> None:
    """Raises UserError where an option, or one of its numbers, is below 1."""
    for name in names:
        value = getattr(arguments, name)
        least = min(value) if isinstance(value, Sequence) else value
        if least < 1:
            raise UserError(f"--{name.replace('_', '-')} is {least}: choose at least 1")


def composed(settings: Sequence[str]) -> Settings:
    """The settings of a training run. Raises UserError for what train.py would refuse."""
    return composed_settings(settings)


def corpus_of(settings: Sequence[str]) -> str:
    """The name of the text in tables and under results/."""
    return composed(settings).corpus


def text_of(settings: Settings) -> dict[str, Any]:
    """What decides the tokens of the text: the settings that cut it, and the SHA-256 of its content. Raises UserError
    for a text that cannot be read."""
    chosen = {key: value for key, value in settings.data.items() if key not in OUTSIDE_DATA}
    return chosen | content_sha256(settings.data)


def measuring_device() -> torch.device:
    """CUDA where there is one, else the CPU, where freed memory is kept as train.py keeps it."""
    device = choose_device("auto", "fp32", 0)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def identity(experiment: str, arguments: Namespace, *inputs: Any) -> str:
    """10 hex digits of what a measurement depends on: the experiment, its options and its ``inputs``, such as the
    text's content or the names of the runs that it evaluates. Neither the commit nor the machine is in it."""
    options = {name: value for name, value in vars(arguments).items() if name not in ("action", "settings")}
    words = json.dumps([experiment, options, inputs], sort_keys=True, default=str)
    return hashlib.sha256(words.encode()).hexdigest()[:RUN_DIGITS]


def is_measured(path: Path, measurement: str, column: str = "run", *, timed: bool = False) -> bool:
    """Whether the table at ``path`` holds this ``measurement``, so that nothing needs to be done but drawing.

    ``column``: ``run``, or ``measurement`` in tables whose ``run`` is the training run that a row is about. ``timed``:
    what was measured is the machine's too, such as seconds, so that rows of another machine do not count.
    """
    if not path.is_file():
        return False
    table = read_rows(path)
    if column not in table or measurement not in set(table[column]):
        return False
    machines = set(table.loc[table[column] == measurement].get("hardware", ()))
    if timed and machines != {hardware()}:
        others = ", ".join(sorted(map(str, machines - {hardware()}))) or "a machine that it does not name"
        tqdm.write(f"{path}: measured before on {others}, now measured on this machine", file=sys.stderr)
        return False
    tqdm.write(f"{path}: measured before with these settings on this text, skipped", file=sys.stderr)
    return True


def write_measured(
    table: pd.DataFrame, path: Path, measurement: str, column: str = "run", beside: str | None = None
) -> None:
    """Write a measured table, ``measurement`` in its ``column``. Rows of the table before it stay where they have
    another value in the column ``beside``."""
    table = table.assign(**{column: measurement})
    table = table[[column, *table.columns.drop(column)]]
    if beside is not None:
        table = beside_others(table, path, beside)
    write_text(path, table.to_csv(index=False))
    print(f"wrote {path}")


def collect_runs(experiment: str, settings: Sequence[str], with_curves: bool = False) -> None:
    """Gather the finished runs of an experiment into its table: those on the text that ``settings`` choose, or without
    settings those on each text that has any. ``with_curves``: see collect. Raises UserError where no run has finished.
    """
    corpora = [corpus_of(settings)] if settings else corpora_with_runs(experiment)
    for corpus in corpora:
        print(f"wrote {collect(experiment, corpus, with_curves=with_curves)}")


def corpora_with_runs(experiment: str) -> list[str]:
    """The names of the texts that finished runs of an experiment were trained on. Raises UserError where there is
    none."""
    paths = (RESULTS / "runs").glob(f"*/{experiment}/*/row.json")
    if not (found := sorted({path.parents[2].name for path in paths})):
        command = f"python -m vocabfold.train --multirun experiment={experiment}"
        raise UserError(f"no run of {experiment} has finished: run {command} first")
    return found


def run_folders(experiment: str, corpus: str) -> list[Path]:
    """The folders of the finished runs of an experiment, the newest last. Raises UserError where there is none."""
    return [folder for folder, _ in finished_runs(experiment, corpus)]
