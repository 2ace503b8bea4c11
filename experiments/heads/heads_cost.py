"""What each contender costs at the size that it is trained at: whole training steps in one interleaved run.

    python -m experiments heads_cost [--scale laptop] [--rounds 7] [KEY=VALUE ...]

writes results/SCALE/heads_cost.csv, one row a head and round: seconds of a step (data, forward, backward, optimizer),
peak memory, FLOPs a token. The heads are those that experiment=heads_pareto trains at this scale; KEY=VALUE are
settings of training, such as data.train=FILE. ``free`` is the same backbone with a head that costs nothing.
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from experiments.study.program import measuring_device, measuring_parser
from vocabfold.command_line import one_line_errors
from vocabfold.data.corpora import load_corpus
from vocabfold.files import write_text
from vocabfold.heads import HeadLoss
from vocabfold.machine import BYTES_PER_GIB, origin
from vocabfold.measure.memory import live_tensors, peak_memory_of
from vocabfold.measure.speed import interleaved_seconds, ratio_summary
from vocabfold.runs.distributed import Ranks
from vocabfold.runs.record import RESULTS
from vocabfold.runs.settings import CONFIG_FOLDER, Settings, settings_from
from vocabfold.tokens import IGNORE_INDEX
from vocabfold.train import Trainer

FREE, REFERENCE = "free", "full_tied"
LEARNING_RATE = 1e-3  # what a step costs does not depend on it


class FreeHead(nn.Module):
    """Sends gradients back and computes nothing else."""

    def forward(self, hidden: Tensor, targets: Tensor, _: bool = False) -> HeadLoss:
        """The mean of ``hidden`` [N, D] in the place of a loss."""
        return HeadLoss(hidden.mean(), (targets != IGNORE_INDEX).sum())


def contenders_of(scale: str, overrides: list[str]) -> dict[str, Settings]:
    """The settings of each head of experiment=heads_pareto at ``scale``."""
    settings = {}
    words = ["experiment=heads_pareto", f"scale={scale}", f"optimizer.learning_rate={LEARNING_RATE}", *overrides]
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        names = compose("train", words, return_hydra_config=True).hydra.sweeper.params.contender.split(",")
        for name in names:
            settings[name] = settings_from(compose("train", [*words, f"contender={name}", f"run_dir=none/{name}"]))
    return settings


def measure(contenders: dict[str, Settings], rounds: int, device: torch.device) -> pd.DataFrame:
    """One row a side and round."""
    corpus = load_corpus(next(iter(contenders.values())).data)
    trainers = {name: Trainer(settings, corpus, Ranks(), device) for name, settings in contenders.items()}
    trainers[FREE] = Trainer(contenders[REFERENCE], corpus, Ranks(), device)
    trainers[FREE].model.head = FreeHead()  # type: ignore[assignment]
    sides = {
        name: lambda trainer=trainer: trainer.train_step(LEARNING_RATE, False) for name, trainer in trainers.items()
    }
    seconds = interleaved_seconds(sides, rounds, 2, device, progress=True)
    rows = []
    for name, trainer in trainers.items():
        memory = peak_memory_of(sides[name], device, live_tensors(trainer.model, trainer.optimizer))
        settings = contenders.get(name, contenders[REFERENCE])
        row = {
            "corpus": corpus.name,
            "hidden_size": settings.model.hidden_size,
            "num_layers": settings.model.num_layers,
        }
        row |= {"side": name, "tokens": settings.batch_size * settings.sequence_length}
        row |= {"peak_memory_gib": memory.peak_bytes / BYTES_PER_GIB, "flops_per_token": trainer.flops_per_token()}
        rows += [row | {"round": index, "seconds": value} for index, value in enumerate(seconds[name])]
    return pd.DataFrame(rows)


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    parser = measuring_parser(__doc__, rounds=7)
    parser.add_argument("overrides", nargs="*", help="settings of training")
    arguments = parser.parse_args()
    device = measuring_device()
    table = measure(contenders_of(arguments.scale, arguments.overrides), arguments.rounds, device)
    table = table.assign(**origin("heads_cost"))
    path = RESULTS / arguments.scale / "heads_cost.csv"
    write_text(path, table.to_csv(index=False))
    seconds = {str(name): rows["seconds"].tolist() for name, rows in table.groupby("side", sort=False)}
    for name in seconds:
        faster = ratio_summary(seconds, REFERENCE, name)
        print(f"{name}: {faster.median:.2f} ({faster.low:.2f} to {faster.high:.2f}) times the speed of {REFERENCE}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
