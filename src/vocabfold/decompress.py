"""Bring back a file that vocabfold.compress coded: ``python -m vocabfold.decompress FILE.vftm --model RUN_FOLDER``."""

from __future__ import annotations

from pathlib import Path

from vocabfold.command_line import ArgumentParser, one_line_errors
from vocabfold.compress import SUFFIX, add_arguments, convert
from vocabfold.errors import UserError
from vocabfold.inference.text_file import decompress, text_bytes


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    parser = ArgumentParser(prog="python -m vocabfold.decompress", description=__doc__)
    add_arguments(parser, f"file to write (default: FILE without {SUFFIX})")
    arguments = parser.parse_args()
    source: Path = arguments.file
    if arguments.output is None and source.suffix != SUFFIX:
        raise UserError(f"{source} does not end in {SUFFIX}: name the file to write with --output")
    convert(decompress, source, arguments.output or source.with_suffix(""), arguments.model, text_bytes(source))


if __name__ == "__main__":
    main()
