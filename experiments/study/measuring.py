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
from hydra import compose, initialize_config_dir
from tqdm import tqdm

from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.measure.allocator import keep_freed_memory
from vocabfold.models.build import ModelSettings
from vocabfold.runs.distributed import choose_device
from vocabfold.runs.record import RESULTS, collect, finished_runs
from vocabfold.runs.settings import CONFIG_FOLDER, Settings, settings_from

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
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return settings_from(compose("train", ["run_dir=none", *settings]))


def corpus_of(settings: Sequence[str]) -> str:
    """The name of the text in tables and under results/."""
    return composed(settings).corpus


def text_of(settings: Settings) -> list[Any]:
    """What decides the content of the text: its settings, and of local files the SHA-256 of their bytes."""
    data = {key: value for key, value in settings.data.items() if key not in ("cache_dir", "workers", "store")}
    files = [data[key] for key in ("train", "valid") if isinstance(data.get(key), str)]
    return [data, [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if Path(file).is_file()]]


def measuring_device() -> torch.device:
    """CUDA where there is one, else the CPU, where freed memory is kept as train.py keeps it."""
    device = choose_device("auto", "fp32", 0)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def identity(experiment: str, arguments: Namespace, *inputs: Any) -> str:
    """8 hex digits of what a measurement depends on: the experiment, its options and its ``inputs``, such as the text's
    content or the names of the runs that it evaluates. Neither the commit nor the machine is in it."""
    options = {name: value for name, value in vars(arguments).items() if name not in ("action", "settings")}
    words = json.dumps([experiment, options, inputs], sort_keys=True, default=str)
    return hashlib.sha256(words.encode()).hexdigest()[:8]


def is_measured(path: Path, run: str, column: str = "run") -> bool:
    """Whether the table at ``path`` holds the measurement ``run`` in ``column``, and so nothing needs to be done but
    drawing."""
    if not path.is_file():
        return False
    table = pd.read_csv(path, usecols=lambda name: name == column, dtype=str)
    if column not in table or run not in set(table[column]):
        return False
    tqdm.write(f"{path}: measured before with these settings and this text, skipped", file=sys.stderr)
    return True


def write_measured(table: pd.DataFrame, path: Path, run: str) -> None:
    """Write a measured table, ``run`` its first column."""
    write_text(path, table.assign(run=run)[["run", *table.columns.drop("run", errors="ignore")]].to_csv(index=False))
    print(f"wrote {path}")


def collect_runs(experiment: str, settings: Sequence[str]) -> None:
    """Gather the finished runs of an experiment into its table: those on the text that ``settings`` choose, or without
    settings those on each text that has any. Raises UserError where no run has finished."""
    corpora = [corpus_of(settings)] if settings else corpora_with_runs(experiment)
    for corpus in corpora:
        print(f"wrote {collect(experiment, corpus)}")


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
