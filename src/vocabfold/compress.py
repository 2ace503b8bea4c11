"""Code a file with a trained language model: ``python -m vocabfold.compress FILE --model RUN_FOLDER``.

Any bytes are coded without loss; text like the model's own becomes shortest. ``--decompress FILE.vftm`` brings it back,
with the same model on the same kind of machine. The model is a finished run, or a folder or GGUF file of a language
model that transformers reads.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from tqdm import tqdm

from vocabfold.command_line import ArgumentParser, one_line_errors
from vocabfold.data.corpora import load_for_generation
from vocabfold.errors import UserError
from vocabfold.inference.text_file import TextModel, compress, decompress, text_model
from vocabfold.runs.load import load_run
from vocabfold.runs.settings import load_settings

SUFFIX = ".vftm"


def load_text_model(folder: Path) -> TextModel:
    """The model of a finished run, or of transformers, on the CPU. Raises UserError for a folder that is neither, or is
    not of text."""
    if folder.suffix == ".gguf" or (folder / "config.json").is_file() or any(folder.glob("*.gguf")):
        from vocabfold.hugging_face.text import load_text_model as load_pretrained  # the extra [hf], else not needed

        return load_pretrained(folder)
    tokenizer = load_for_generation(load_settings(folder).data)
    if tokenizer is None:
        raise UserError(f"{folder} was trained on token sequences without a text form: it cannot code text")
    return text_model(load_run(folder, torch.device("cpu")), tokenizer)


def end(number: int, _: FrameType | None) -> NoReturn:
    """Handle SIGTERM as Ctrl-C is handled: the file that is half written goes."""
    raise SystemExit(128 + number)


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    parser = ArgumentParser(prog="python -m vocabfold.compress", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of a finished training run, or a model of transformers"
    )
    parser.add_argument("--decompress", action="store_true", help=f"bring FILE{SUFFIX} back")
    parser.add_argument("--output", type=Path, help=f"file to write (default: FILE{SUFFIX}, or FILE without it)")
    arguments = parser.parse_args()
    source: Path = arguments.file
    if not source.is_file():
        raise UserError(f"there is no file {source}")
    if arguments.decompress and arguments.output is None and source.suffix != SUFFIX:
        raise UserError(f"{source} does not end in {SUFFIX}: name the file to write with --output")
    default = source.with_suffix("") if arguments.decompress else source.with_name(source.name + SUFFIX)
    target: Path = arguments.output or default
    if target.exists():
        raise UserError(f"{target} exists: remove it or name another file with --output")
    signal.signal(signal.SIGTERM, end)
    coder = load_text_model(arguments.model)
    with tqdm(unit="B", unit_scale=True, desc=source.name, disable=None) as bar:

        def show(done: int, whole: int) -> None:
            bar.total = whole
            bar.update(done - bar.n)

        try:
            (decompress if arguments.decompress else compress)(source, target, coder, show)
        except KeyboardInterrupt:
            bar.close()
            print(f"interrupted: {target} was not written", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None
    before, after = source.stat().st_size, target.stat().st_size
    print(f"{source}: {before:,} bytes -> {target}: {after:,} bytes")


if __name__ == "__main__":
    main()
