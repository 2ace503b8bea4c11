"""Training from every token store: bytes on disk, and the share of a training step that waits for its batch.

    python -m experiments token_store [--scale laptop] [--steps 96] [--text FILE]

writes results/SCALE/token_store.csv, one row a store, and .md. The model is the grouped one at the size of the paper's
ablation, whose steps are the fastest and so wait most. Without --text the stream is embedded stories.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from vocabfold.command_line import ArgumentParser, one_line_errors
from vocabfold.data.batches import Batches
from vocabfold.data.corpora import load_corpus
from vocabfold.data.token_file import STORES
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.heads import HeadSettings
from vocabfold.machine import code_commit, hardware, torch_version
from vocabfold.models.build import ModelSettings, build_model
from vocabfold.runs.record import RESULTS

NAME = "token_store"
WARM_UP_STEPS = 2


def measure(data: dict[str, Any], steps: int) -> dict[str, Any]:
    """One training of ``steps`` steps from a store: where its time went, and the losses that it saw."""
    corpus = load_corpus(data)
    torch.manual_seed(0)
    head = HeadSettings(name="grouped", tied=False, scorer="scale_shift_sorted")
    model = build_model(
        ModelSettings(hidden_size=64, num_layers=4, num_heads=2, max_positions=256), head, corpus.vocabulary_size
    )
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)
    batches = Batches(corpus.train, sequence_length=256, batch_size=8, seed=0, end_token=corpus.end_token)
    waited = total = loss_sum = 0.0
    for step in range(steps + WARM_UP_STEPS):
        started = time.perf_counter()
        inputs, targets = batches.batch(step)
        ready = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = model(inputs, targets).loss
        loss.backward()
        optimizer.step()
        loss_sum += float(loss.detach())
        if step >= WARM_UP_STEPS:
            waited += ready - started
            total += time.perf_counter() - started
    return {
        "tokens": len(corpus.train),
        "stored_bytes": sum(path.stat().st_size for path in corpus.train.folder.glob("tokens.*")),
        "steps": steps,
        "mean_loss_nats": loss_sum / (steps + WARM_UP_STEPS),
        "step_milliseconds": 1e3 * total / steps,
        "waiting_share": waited / total,
    }


def markdown(table: pd.DataFrame) -> str:
    """The table and the goal."""
    lines = ["| store | bits a token on disk | a step (ms) | of it waiting for data |", "|---|---|---|---|"]
    for _, row in table.iterrows():
        bits = 8 * row["stored_bytes"] / row["tokens"]
        lines.append(f"| {row['store']} | {bits:.3f} | {row['step_milliseconds']:.1f} | {row['waiting_share']:.2%} |")
    first, most = table.iloc[0], table["waiting_share"].max()
    same = "the same" if table["mean_loss_nats"].nunique() == 1 else "NOT the same"
    return "\n".join(
        [
            *lines,
            "",
            f"* a step waits at most 2% for data: at most {most:.2%}: {'met' if most <= 0.02 else 'not met'}",
            f"* losses of all {first['steps']} steps: {same} from every store",
            "",
            f"{first['corpus']}, {first['tokens']:,} tokens; windows in random order. Hardware: {first['hardware']}.",
            "",
        ]
    )


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--scale", default="laptop")
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--text", type=Path, help="a local UTF-8 text")
    parser.add_argument("--corpus", default="text", help="what the table calls --text (default %(default)s)")
    parser.add_argument("--stories", type=int, default=1000, help="embedded stories, where there is no --text")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        raise UserError(f"--steps is {arguments.steps}: choose at least 1")
    if arguments.text is None:
        sizes = {"num_train_documents": arguments.stories, "num_valid_documents": 1}
        corpus, source = "stories", {"name": "stories", "seed": 0, **sizes}
    else:
        corpus, source = arguments.corpus, {"name": "text", "train": str(arguments.text), "valid": str(arguments.text)}
    rows = []
    with tempfile.TemporaryDirectory() as cache_dir:
        for store in STORES:
            data = source | {
                "tokenizer": "gpt2",
                "cache_dir": cache_dir,
                "workers": 1,
                "store": store,
                "layout": "packed",
            }
            lead = {"experiment": NAME, "scale": arguments.scale, "corpus": corpus, "store": store}
            named = "" if arguments.text is None else " --text FILE"
            command = f"python -m experiments token_store --scale {arguments.scale}{named}"
            origin = {"hardware": hardware(), "torch": torch_version(), "commit": code_commit(), "command": command}
            rows.append(lead | measure(data, arguments.steps) | origin)
    table = pd.DataFrame(rows)
    path = RESULTS / arguments.scale / f"{NAME}.csv"
    write_text(path, table.to_csv(index=False))
    write_text(path.with_suffix(".md"), markdown(table))
    print(markdown(table), file=sys.stdout)


if __name__ == "__main__":
    main()
