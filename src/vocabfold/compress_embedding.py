"""Compress the input embedding of finished runs: each becomes a new run, its own folder and its own line in the table.

    python -m vocabfold.compress_embedding RUN --as embedding=int4
    python -m vocabfold.compress_embedding RUN ... --as "embedding=low_rank embedding.rank=8" --recovery-share 0 0.1
    python -m vocabfold.compress_embedding RUN ... @conf/compression/embedding_compression_text.txt

A recovery share of 0.1 trains the compressed model, embedding included, on a tenth as many tokens as the run had.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vocabfold.command_line import ArgumentParser, one_line_errors
from vocabfold.embeddings.build import EmbeddingSettings, resolve_settings
from vocabfold.errors import UserError
from vocabfold.runs.load import load_run
from vocabfold.runs.record import finished_row
from vocabfold.runs.settings import CONFIG_FOLDER, Settings, load_settings, run_name
from vocabfold.train import train


def compressed_settings(
    folder: Path, embedding: EmbeddingSettings, recovery_share: float, learning_rate: float
) -> Settings:
    """The settings of the new run: those of the run in ``folder`` but for embedding, budget and learning rate.

    Raises UserError for a folder that holds no finished run with a dense embedding.
    """
    settings = load_settings(folder)
    row = finished_row(folder)
    if row is None:
        raise UserError(f"{folder} has not finished: run its command again first")
    table = load_run(folder, torch.device("cpu")).gpt.token_embedding.weight
    if settings.embedding.name != "dense" or not isinstance(table, torch.Tensor):
        raise UserError(f"{folder} has no dense embedding: name a run that has")
    settings.embedding = dataclasses.replace(resolve_settings(embedding, table.detach()), compressed_from=str(folder))
    settings.budget = dataclasses.replace(
        settings.budget, epochs=None, steps=None, seconds=None, tokens=round(recovery_share * row["tokens"])
    )
    settings.optimizer.learning_rate = learning_rate
    settings.run_dir = ""
    named = run_name(OmegaConf.create(dataclasses.asdict(settings)))
    settings.run_dir = str(folder.parent / named)
    settings.check()
    return settings


def embedding_of(overrides: str) -> EmbeddingSettings:
    """The embedding that ``embedding=NAME embedding.KEY=VALUE ..`` names, its defaults from conf/embedding."""
    words = shlex.split(overrides)
    if not words or any(not word.startswith("embedding") for word in words):
        raise UserError(f"--as {overrides!r}: write embedding=NAME, then embedding.KEY=VALUE, in quotes")
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        node = compose("train", words).embedding
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(EmbeddingSettings), node))
    assert isinstance(settings, EmbeddingSettings)
    return settings


def parser() -> ArgumentParser:
    """The command line."""
    made = ArgumentParser(
        prog="python -m vocabfold.compress_embedding",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
    )
    made.add_argument("runs", type=Path, nargs="+", help="folders of finished runs with a dense embedding")
    made.add_argument("--as", dest="embeddings", nargs="+", required=True, help="one or more, each in quotes")
    made.add_argument("--recovery-share", type=float, nargs="+", default=[0.0], help="of the run's tokens (default 0)")
    made.add_argument(
        "--learning-rate", type=float, default=5e-4, help="at which recovery begins (default %(default)s)"
    )
    return made


def compress(runs: Sequence[Path], embeddings: Sequence[str], shares: Sequence[float], learning_rate: float) -> None:
    """Every run as every embedding with every recovery share; what has finished before is skipped."""
    if any(not 0 <= share <= 1 for share in shares):
        raise UserError(f"--recovery-share {' '.join(map(str, shares))}: choose numbers from 0 to 1")
    kinds = {overrides: embedding_of(overrides) for overrides in embeddings}
    for folder in runs:
        for overrides, embedding in kinds.items():
            for share in shares:
                settings = compressed_settings(folder, embedding, share, learning_rate)
                options = ["--as", overrides, "--recovery-share", str(share), "--learning-rate", str(learning_rate)]
                command = ["python", "-m", "vocabfold.compress_embedding", str(folder), *options]
                row = train(settings, shlex.join(command))
                print(
                    f"{settings.run_dir}: {row['embedding_compression']:.2f}x, relative error "
                    f"{row['embedding_relative_error']:.4f}, loss {row['validation_loss_nats']:.4f} nats"
                )


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    arguments = parser().parse_args(sys.argv[1:])
    compress(arguments.runs, arguments.embeddings, arguments.recovery_share, arguments.learning_rate)


if __name__ == "__main__":
    main()
