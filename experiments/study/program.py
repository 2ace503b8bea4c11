"""What the programs that measure share: their options, the device that they measure on, the model that they build."""

from __future__ import annotations

from argparse import Namespace

import torch

from vocabfold.command_line import ArgumentParser
from vocabfold.measure.allocator import keep_freed_memory
from vocabfold.models.build import ModelSettings
from vocabfold.runs.distributed import choose_device


def measuring_parser(description: str | None, rounds: int) -> ArgumentParser:
    """A command line with ``--scale`` and ``--rounds``."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--scale", default="laptop", help="results/SCALE takes the table (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved (default %(default)s)")
    return parser


def add_sizes(parser: ArgumentParser, model: ModelSettings, batch_size: int) -> None:
    """Options for the sizes of ``model_of`` and of its batch, with the defaults given."""
    parser.add_argument("--hidden-size", type=int, default=model.hidden_size)
    parser.add_argument("--num-layers", type=int, default=model.num_layers)
    parser.add_argument("--num-heads", type=int, default=model.num_heads)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--sequence-length", type=int, default=model.max_positions)


def model_of(arguments: Namespace) -> ModelSettings:
    """The model that the options of ``add_sizes`` describe."""
    return ModelSettings(
        hidden_size=arguments.hidden_size,
        num_layers=arguments.num_layers,
        num_heads=arguments.num_heads,
        max_positions=arguments.sequence_length,
    )


def measuring_device() -> torch.device:
    """CUDA where there is one, else the CPU, where freed memory is kept as train.py keeps it."""
    device = choose_device("auto", "fp32", 0)
    if device.type == "cpu":
        keep_freed_memory()
    return device
