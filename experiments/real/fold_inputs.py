"""What real_fold and real_fold_work measure with: SmolLM2's output rows, and its states on texts to learn from and on
texts to measure on."""

from __future__ import annotations

import functools
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from torch import Tensor

from experiments.real.states import States, TextPart, cached_states
from experiments.study.measuring import at_least_one, identity
from vocabfold.errors import UserError
from vocabfold.files import file_sha256
from vocabfold.hugging_face import load
from vocabfold.hugging_face.fetch import DEFAULT_FOLDER

MODEL = "SmolLM2-135M-Instruct"
MOST_OF_DOCUMENT = {"valid": 400, "train": 700}  # targets: many documents rather than long ones


def add_options(parser: ArgumentParser) -> None:
    """The options of ``measure``."""
    parser.add_argument("--smollm2", type=Path, required=True, help="GGUF file of SmolLM2-135M-Instruct")
    parser.add_argument("--valid", nargs="+", required=True, metavar="NAME=FILE", help="texts to measure on")
    parser.add_argument("--train", nargs="+", type=Path, required=True, metavar="FILE", help="texts to learn from")
    parser.add_argument("--valid-tokens", type=int, default=20_000, help="of each text (default %(default)s)")
    parser.add_argument("--train-tokens", type=int, default=60_000, help="of each text (default %(default)s)")
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_FOLDER / "states", help="folder for hidden states (default %(default)s)"
    )


def texts_of(arguments: Namespace) -> dict[str, Path]:
    """Name -> file of the validation texts. Raises UserError for files that are not there."""
    named = {name: Path(path) for name, _, path in (word.partition("=") for word in arguments.valid)}
    for path in [arguments.smollm2, *named.values(), *arguments.train]:
        if not path.is_file():
            raise UserError(f"there is no {path}: give NAME=FILE after --valid, and files that exist")
    return named


def identity_of(experiment: str, arguments: Namespace) -> str:
    """Of a measurement: the model, the texts and how much of them."""
    at_least_one(arguments, "valid_tokens", "train_tokens")
    named = texts_of(arguments)
    options = Namespace(valid_tokens=arguments.valid_tokens, train_tokens=arguments.train_tokens)
    contents = [file_sha256(path) for path in [*named.values(), *arguments.train]]
    return identity(experiment, options, list(named), file_sha256(arguments.smollm2), contents)


def rows_and_states(arguments: Namespace) -> tuple[Tensor, States, dict[str, States]]:
    """(The output rows [V, D], the states to learn from, those of each validation text)."""
    loaded, model_sha256 = functools.cache(lambda: load(arguments.smollm2)), file_sha256(arguments.smollm2)

    def states_of(path: Path, kind: str) -> States:
        part = TextPart(path, getattr(arguments, f"{kind}_tokens"), MOST_OF_DOCUMENT[kind])
        return cached_states(arguments.cache, model_sha256, part, loaded()[1], lambda: loaded()[0])

    valid = {name: states_of(path, "valid") for name, path in texts_of(arguments).items()}
    parts = [states_of(path, "train") for path in arguments.train]
    train = States(*(torch.cat(each) for each in zip(*(vars(part).values() for part in parts), strict=True)))
    return loaded()[0].get_output_embeddings().weight.detach(), train, valid
