"""What the training program says of its jobs: one alone, or those of a sweep."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from tqdm import tqdm

from vocabfold.command_line import exit_with, is_out_of_memory, one_line, user_errors
from vocabfold.errors import UserError
from vocabfold.runs.compose import check_groups

SWEEP_FLAGS = ("-m", "--multirun")
OUT_OF_MEMORY = "out of memory: lower batch_size, sequence_length or the model's size, or choose another head"


def in_order(arguments: Sequence[str]) -> list[str]:
    """A command line as Hydra's parser reads it: it does not take overrides on both sides of ``--multirun``."""
    flags = [argument for argument in arguments if argument in SWEEP_FLAGS]
    return [*flags[:1], *(argument for argument in arguments if argument not in SWEEP_FLAGS)]


def check_options(arguments: Sequence[str]) -> None:
    """Raise UserError for options and choices that Hydra would answer with a page of usage or a traceback."""
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        options, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; --help lists what there is") from error
    if unknown:
        raise UserError(f"unknown option {unknown[0]}; --help lists what there is")
    given = [f"--{name}" for name in ("run", "multirun", "cfg", "info") if getattr(options, name)]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} exclude each other: leave one out")
    check_groups(options.overrides)


def check_row(folder: Path, row: dict[str, Any]) -> None:
    """Raise UserError where a finished run's row lacks what is told of it."""
    numbers = ("validation_loss_nats", "perplexity", "tokens")
    if not all(isinstance(row.get(name), int | float) for name in numbers) or not {"model", "corpus"} <= set(row):
        raise UserError(f"{folder / 'row.json'} is damaged: delete the run folder and train again")


def outcome(folder: Path, row: dict[str, Any]) -> str:
    """Two lines for a person: how good the run is and where it lies; what to do with it."""
    loss, perplexity = row["validation_loss_nats"], row["perplexity"]
    found = f"validation loss {loss:.4f} nats (perplexity {perplexity:.1f}) after {row['tokens']:,} tokens: {folder}"
    if row["model"] == "cnn" or row["corpus"] == "zipf":
        return f"{found}\nits losses on the way: {folder / 'metrics.jsonl'}"
    return f'{found}\ncontinue a text with it: python -m vocabfold.generate {folder} "Once upon a time"'


@contextmanager
def one_line_job() -> Iterator[None]:
    """Run one of Hydra's jobs: what a person can mend is one line. Alone it ends the program; in a sweep it is told at
    once, since the sweep itself ends with the error of one job, and goes on to Hydra's launcher as a UserError."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            reason = OUT_OF_MEMORY
        elif isinstance(error, user_errors()):
            reason = one_line(error)
        else:
            raise
        job = HydraConfig.get()
        if job.mode != RunMode.MULTIRUN:
            exit_with(UserError(reason))
        tqdm.write(f"failed: {' '.join(job.overrides.task)}: {reason}", file=sys.stderr)
        end = "a job of the sweep failed, as told above; the same command runs what has not finished"
        raise UserError(end) from None
