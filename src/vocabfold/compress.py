"""Code a file with a trained language model: ``python -m vocabfold.compress FILE --model RUN_FOLDER``.

Any bytes are coded without loss; text like the model's own becomes shortest. ``python -m vocabfold.decompress`` brings
it back, with the same model on the same kind of machine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from vocabfold.command_line import ArgumentParser, one_line_errors
from vocabfold.errors import UserError
from vocabfold.inference.text_file import TextModel, compress, load_text_model

SUFFIX = ".vftm"


def add_arguments(parser: ArgumentParser, output_help: str) -> None:
    """What both programs ask for."""
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="folder of a finished training run")
    parser.add_argument("--output", type=Path, help=output_help)


def convert(
    action: Callable[[Path, Path, TextModel, Callable[[int], object]], None],
    source: Path,
    target: Path,
    model: Path,
    num_bytes: int,
) -> None:
    """Run ``action`` under a progress bar and say what it wrote. Raises UserError where ``target`` exists."""
    if target.exists():
        raise UserError(f"{target} exists: remove it or name another file with --output")
    coder = load_text_model(model)
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc=source.name, disable=None) as bar:
        action(source, target, coder, bar.update)
    before, after = source.stat().st_size, target.stat().st_size
    print(f"{source}: {before:,} bytes -> {target}: {after:,} bytes")


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    parser = ArgumentParser(prog="python -m vocabfold.compress", description=__doc__)
    add_arguments(parser, f"file to write (default: FILE{SUFFIX})")
    arguments = parser.parse_args()
    source: Path = arguments.file
    if not source.is_file():
        raise UserError(f"there is no file {source}")
    target = arguments.output or source.with_name(source.name + SUFFIX)
    convert(compress, source, target, arguments.model, source.stat().st_size)


if __name__ == "__main__":
    main()
