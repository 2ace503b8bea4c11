"""What each head costs at the size that it is trained at: whole training steps in one interleaved run.

    python -m experiments heads_cost measure [--rounds 7] [KEY=VALUE ...]

writes results/CORPUS/heads_cost.csv, one row a method and round: seconds of a step (data, forward, backward,
optimizer), peak memory, FLOPs a token. The methods are the heads that experiment=heads_pareto trains on that text, and
``no_head``, the same backbone with a head that costs nothing. heads_pareto draws the table.
"""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from experiments.study.measuring import (
    add_rounds,
    add_settings,
    identity,
    is_measured,
    measuring_device,
    write_measured,
)
from vocabfold.data.corpora import Corpus, load_corpus
from vocabfold.heads import HeadLoss
from vocabfold.machine import BYTES_PER_GIB, origin
from vocabfold.measure.memory import live_tensors, peak_memory_of
from vocabfold.measure.speed import interleaved_seconds, ratio_summary
from vocabfold.runs.compose import composed, composed_settings
from vocabfold.runs.distributed import Ranks
from vocabfold.runs.settings import Settings
from vocabfold.runs.tables import RESULTS
from vocabfold.tokens import IGNORE_INDEX
from vocabfold.trainer import Trainer

NO_HEAD, REFERENCE = "no_head", "full"
LEARNING_RATE = 1e-3  # what a step costs does not depend on it


class NoHead(nn.Module):
    """Sends gradients back and computes nothing else."""

    def forward(self, hidden: Tensor, targets: Tensor, _: bool = False) -> HeadLoss:
        """The mean of ``hidden`` [N, D] in the place of a loss."""
        return HeadLoss(hidden.mean(), (targets != IGNORE_INDEX).sum())


def heads_of(
    overrides: Sequence[str],
    experiment: str = "heads_pareto",
    heads: Sequence[str] = (),
    variants: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Settings]:
    """The settings of each of the ``heads`` (none named: those of the experiment's own sweep) on the text that
    ``overrides`` choose; ``variants``: further methods by name, each by its overrides."""
    words = [f"experiment={experiment}", f"optimizer.learning_rate={LEARNING_RATE}", *overrides]
    swept = str(composed(words, with_hydra=True).hydra.sweeper.params.head).split(",")
    chosen = {name: [f"head={name}"] for name in heads or swept} | dict(variants or {})
    return {
        name: composed_settings([*words, *own, f"run_dir=none/{own[0].partition('=')[2]}"])
        for name, own in chosen.items()
    }


def measure_steps(heads: dict[str, Settings], corpus: Corpus, rounds: int, device: torch.device) -> pd.DataFrame:
    """One row a method and round. The backbone of ``NO_HEAD`` is that of the first head."""
    trainers = {name: Trainer(settings, corpus, Ranks(), device) for name, settings in heads.items()}
    first = next(iter(heads.values()))
    trainers[NO_HEAD] = Trainer(first, corpus, Ranks(), device)
    trainers[NO_HEAD].model.head = NoHead()  # type: ignore[assignment]
    methods = {
        name: lambda trainer=trainer: trainer.train_step(LEARNING_RATE, False) for name, trainer in trainers.items()
    }
    seconds = interleaved_seconds(methods, rounds, 2, device, progress=True)
    rows = []
    for name, trainer in trainers.items():
        memory = peak_memory_of(methods[name], device, live_tensors(trainer.model, trainer.optimizer))
        settings = heads.get(name, first)
        row = {
            **corpus.described,
            "hidden_size": settings.model.hidden_size,
            "num_layers": settings.model.num_layers,
        }
        row |= {"method": name, "tokens": settings.batch_size * settings.sequence_length}
        row |= {"peak_memory_gib": memory.peak_bytes / BYTES_PER_GIB, "flops_per_token": trainer.flops_per_token()}
        rows += [row | {"round": index, "seconds": value} for index, value in enumerate(seconds[name])]
    return pd.DataFrame(rows)


def add_options(parser: ArgumentParser) -> None:
    """Rounds, and settings of training."""
    add_rounds(parser, 7)
    add_settings(parser)


def measure(arguments: Namespace) -> None:
    """Time the heads and write the table; print each one's ratio to the full softmax."""
    heads = heads_of(arguments.settings)
    corpus = load_corpus(heads[REFERENCE].data)
    path = RESULTS / heads[REFERENCE].corpus / "heads_cost.csv"
    measurement = identity(
        "heads_cost", arguments, {name: dataclasses.asdict(settings) for name, settings in heads.items()}
    )
    if is_measured(path, measurement, timed=True):
        return
    table = measure_steps(heads, corpus, arguments.rounds, measuring_device()).assign(**origin())
    seconds = {str(name): rows["seconds"].tolist() for name, rows in table.groupby("method", sort=False)}
    for name in seconds:
        faster = ratio_summary(seconds, REFERENCE, name)
        print(f"{name}: {faster.median:.2f} ({faster.low:.2f} to {faster.high:.2f}) times the speed of {REFERENCE}")
    write_measured(table, path, measurement)
