"""What the training program says of its jobs: one alone, or those of a sweep."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from tqdm import tqdm

from vocabfold.command_line import is_out_of_memory, one_line, user_errors
from vocabfold.errors import UserError

SWEEP_FLAGS = ("-m", "--multirun")
OUT_OF_MEMORY = "out of memory: lower batch_size, sequence_length or the model's size, or choose another head"


def in_order(arguments: Sequence[str]) -> list[str]:
    """A command line as Hydra's parser reads it: it does not take overrides on both sides of ``--multirun``."""
    flags = [argument for argument in arguments if argument in SWEEP_FLAGS]
    return [*flags[:1], *(argument for argument in arguments if argument not in SWEEP_FLAGS)]


def check_options(arguments: Sequence[str]) -> None:
    """Raise UserError for options that Hydra would answer with a page of usage or a traceback."""
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


def outcome(folder: Path, row: dict[str, Any]) -> str:
    """Two lines for a person: how good the run is and where it lies; what to do with it."""
    loss, perplexity = row["validation_loss_nats"], row["perplexity"]
    found = f"validation loss {loss:.4f} nats (perplexity {perplexity:.1f}) after {row['tokens']:,} tokens: {folder}"
    if row["model"] == "cnn" or row["corpus"] == "zipf":
        return f"{found}\nits losses on the way: {folder / 'metrics.jsonl'}"
    return f'{found}\ncontinue a text with it: python -m vocabfold.generate {folder} "Once upon a time"'


def as_user_error(error: Exception) -> Exception:
    """What a person can mend as a UserError of one line; any other error as it is."""
    if is_out_of_memory(error):
        return UserError(OUT_OF_MEMORY)
    return UserError(one_line(error)) if isinstance(error, user_errors()) else error


def tell_failed_job(error: Exception, overrides: Sequence[str]) -> UserError:
    """Print which job of a sweep failed and why, now: the sweep itself ends with one of its errors. Return that end."""
    tqdm.write(f"failed: {' '.join(overrides)}: {error}", file=sys.stderr)
    return UserError("a job of the sweep failed, as told above; the same command runs what has not finished")
