"""Perplexity through rounded keys and values: validation text read through each kind of cache.

    python -m experiments caching_perplexity [--scale laptop] [--run FOLDER ...]

needs finished runs (default: those of experiment=caching) and writes results/SCALE/caching_perplexity.csv, one row a
run and kind of keys and values; caching.py shows it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from experiments.study.statistics import mean_and_interval
from experiments.tokens.quality import losses_through_cache
from vocabfold.command_line import ArgumentParser, one_line_errors
from vocabfold.data.batches import BatchPlan
from vocabfold.data.corpora import load_corpus
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.inference import LAYER_CACHES, bytes_a_position
from vocabfold.machine import origin
from vocabfold.runs.load import load_run
from vocabfold.runs.record import RESULTS, finished_row
from vocabfold.runs.settings import load_settings

CHUNK = 64  # tokens that are read at a time
SHORT_CONTEXT = 16  # tokens: the control, which tells how much the past that is rounded matters at all
IDENTITY = ("corpus", "seed", "model", "hidden_size", "num_layers", "head", "scorer", "steps", "tokens")


def perplexities(run: Path) -> list[dict[str, Any]]:
    """One row a kind of keys and values, over the whole validation set of the run: loss, and its change from exact.

    The 95% interval of the change is over the rows of the validation set, each as long as a training sequence. A last
    row, without an interval, has exact keys and values but forgets all after SHORT_CONTEXT tokens.
    """
    settings = load_settings(run)
    model = load_run(run, torch.device("cpu"))
    corpus = load_corpus(settings.data)
    length = settings.sequence_length
    batches = corpus.batches("valid", BatchPlan(length, batch_size=4, seed=0))
    short = corpus.batches("valid", BatchPlan(SHORT_CONTEXT, batch_size=4 * length // SHORT_CONTEXT, seed=0))
    trained = finished_row(run) or {}
    rows, exact = [], None
    for kind, layer_cache in tqdm(LAYER_CACHES.items(), desc=run.name):
        sums, counts = losses_through_cache(model, batches.evaluation_batches(), kind, CHUNK)
        exact = sums if exact is None else exact
        whole = counts == length  # the last row may be shorter, and then has another spread
        change, half_width = mean_and_interval(((sums - exact)[whole] / length).tolist())
        loss = float(sums.sum() / counts.sum())
        cache = model.gpt.new_cache(1, layer_cache)
        with torch.inference_mode():
            model.gpt(torch.zeros(1, 1, dtype=torch.long), cache)
        row: dict[str, Any] = {name: trained.get(name) for name in IDENTITY}
        row |= {"sequence_length": length, "key_values": kind, "validation_loss_nats": loss}
        row |= {"perplexity": np.exp(loss), "loss_change_nats": change, "loss_change_half_width_nats": half_width}
        rows.append(row | {"bytes_a_position": bytes_a_position(cache)})
    sums, counts = losses_through_cache(model, short.evaluation_batches(), "exact", SHORT_CONTEXT)
    loss = float(sums.sum() / counts.sum())
    control = {"key_values": f"exact, {SHORT_CONTEXT} tokens of context", "validation_loss_nats": loss}
    control |= {"perplexity": np.exp(loss), "loss_change_nats": loss - rows[0]["validation_loss_nats"]}
    rows.append(rows[0] | control | {"loss_change_half_width_nats": None})
    return rows


def finished_runs(scale: str) -> list[Path]:
    """The folders of the finished runs of experiment=caching, the newest last. Raises UserError where there is none."""
    folder = RESULTS / "runs" / scale / "caching"
    rows = sorted(folder.glob("*/row.json"), key=lambda path: path.stat().st_mtime)
    if not rows:
        command = f"python -m vocabfold.train --multirun experiment=caching scale={scale}"
        raise UserError(f"{folder} holds no finished run: {command} makes it")
    return [path.parent for path in rows]


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--scale", default="laptop", help="results/SCALE takes the table (default %(default)s)")
    parser.add_argument("--run", type=Path, nargs="+", help="finished runs; default: those of the experiment")
    arguments = parser.parse_args()
    runs = arguments.run or finished_runs(arguments.scale)
    table = pd.DataFrame([row for run in runs for row in perplexities(run)])
    table.insert(0, "experiment", "caching_perplexity")
    table.insert(1, "scale", arguments.scale)
    table = table.assign(
        **origin("caching_perplexity"),
    )
    path = RESULTS / arguments.scale / "caching_perplexity.csv"
    write_text(path, table.to_csv(index=False))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
