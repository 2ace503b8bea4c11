"""Peak memory of decoding with each cache at a full context: prompts of 510 of 512 positions, two new tokens.

    python -m experiments caching_memory [--scale laptop] [--run FOLDER]

writes results/SCALE/caching_memory.csv, one row a cache, for an unseen prompt and for one that comes again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from experiments.tokens.caching_perplexity import finished_runs
from experiments.tokens.caching_speed import REUSE, Side, Workload, build_sides, identity, trained_model, write
from vocabfold.command_line import ArgumentParser, one_line_errors
from vocabfold.machine import BYTES_PER_MIB
from vocabfold.measure.memory import peak_memory_of

WORKLOADS = (Workload("distinct", 510, 0, 2), Workload("repeated", 510, 510, 2, REUSE))


def peak_row(side: Side) -> dict[str, object]:
    """Bytes at the peak of one answer after another one: weights, what is kept between answers, and the rest."""
    side.step()
    kept = side.held()
    kept_bytes = sum(tensor.nbytes for tensor in kept)
    memory = peak_memory_of(side.step, torch.device("cpu"), [*side.module.parameters(), *side.module.buffers(), *kept])
    return identity(side) | {
        "weights_mib": (memory.live_bytes_before - kept_bytes) / BYTES_PER_MIB,
        "kept_between_answers_mib": kept_bytes / BYTES_PER_MIB,
        "peak_memory_mib": memory.peak_bytes / BYTES_PER_MIB,
    }


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--scale", default="laptop", help="results/SCALE takes the table (default %(default)s)")
    parser.add_argument("--run", type=Path, help="folder of the trained run; default: the newest of experiment=caching")
    arguments = parser.parse_args()
    run = arguments.run or finished_runs(arguments.scale)[-1]
    model, tokens = trained_model(run, WORKLOADS[0].prompt_tokens + WORKLOADS[0].new_tokens - 1)
    with tempfile.TemporaryDirectory() as answers:
        sides = [
            side
            for number, workload in enumerate(WORKLOADS)
            for side in build_sides(model, workload, tokens, Path(answers) / str(number)).values()
        ]
        rows = [peak_row(side) for side in tqdm(sides, desc="peak memory")]
    write(pd.DataFrame(rows), run, arguments.scale, "caching_memory")


if __name__ == "__main__":
    main()
