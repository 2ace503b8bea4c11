"""Which tokens should share a group? Orders learned from the text, by the loss on training documents kept apart.

    python -m vocabfold.train --multirun experiment=learned_orders data=text data.train=FILE data.valid=FILE
    python -m experiments learned_orders measure
    python -m experiments learned_orders draw [CORPUS ...]

results/CORPUS/learned_orders.csv, the runs, and learned_orders_groups.csv, what each order's groups tell of each other
and what it costs to make it -> learned_orders.md.
"""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from experiments.study.figures import read_measured, trained_on
from experiments.study.measuring import (
    add_settings,
    collect_runs,
    corpora_with_runs,
    corpus_of,
    identity,
    is_measured,
    run_folders,
    write_measured,
)
from experiments.study.statistics import difference_over_seeds, mean_and_interval
from vocabfold.data.corpora import Corpus, load_data
from vocabfold.files import write_text
from vocabfold.heads import FoldedHead
from vocabfold.heads.exchange import mutual_information
from vocabfold.machine import origin
from vocabfold.runs.load import load_run
from vocabfold.runs.record import finished_row
from vocabfold.runs.settings import Settings, load_settings
from vocabfold.runs.tables import RESULTS, read_table
from vocabfold.runs.token_order import token_order

NAME, GROUPS = "learned_orders", "learned_orders_groups"
REFERENCE = "linear_clustered_counts"
LOSSES = ("validation_loss_nats", "validation_group_loss", "validation_token_loss")

add_options = add_settings


def measure(arguments: Namespace) -> None:
    """Gather the finished runs into the table, and make each of their orders again, on the clock."""
    collect_runs(NAME, arguments.settings)
    for corpus in [corpus_of(arguments.settings)] if arguments.settings else corpora_with_runs(NAME):
        measure_groups(corpus, arguments)


def measure_groups(corpus: str, arguments: Namespace) -> None:
    """What the groups of each head and number of training tokens tell of each other in its text, and the processor's
    seconds that making the order takes."""
    last: dict[tuple[str, int], Path] = {}
    for folder in run_folders(NAME, corpus):
        row = finished_row(folder)
        if row is not None and row.get("partition_order"):
            last[row["head"], row["tokens"]] = folder
    path, measurement = RESULTS / corpus / f"{GROUPS}.csv", identity(GROUPS, arguments, sorted(map(str, last.values())))
    if is_measured(path, measurement):
        return
    rows = []
    for (head, tokens), folder in tqdm(sorted(last.items()), desc="orders", leave=False):
        rows.append({"head": head, "tokens": tokens, **groups_of(folder, load_settings(folder)), **origin()})
    write_measured(pd.DataFrame(rows), path, measurement)


def groups_of(folder: Path, settings: Settings) -> dict[str, Any]:
    """Of one run: the mutual information of the groups it was trained with, and the seconds of making its order."""
    text = load_data(settings.data).with_development(settings.development_share)
    corpus = text.with_training_tokens(settings.training_tokens)
    assert isinstance(corpus, Corpus)
    head = load_run(folder, torch.device("cpu")).head
    assert isinstance(head, FoldedHead)
    started = time.process_time()
    token_order(settings.head, corpus.vocabulary_size, corpus.train.tokens)
    seconds = time.process_time() - started
    information = mutual_information(corpus.train.tokens, head.partition.group_of)
    return {"mutual_information_nats": information, "order_cpu_seconds": seconds}


def draw(corpus: str) -> None:
    """Write one corpus' table in words."""
    path = RESULTS / corpus / f"{NAME}.md"
    write_text(path, describe(read_table(NAME, corpus), read_measured(RESULTS / corpus / f"{GROUPS}.csv")))
    print(f"wrote {path}")


def describe(runs: pd.DataFrame, groups: pd.DataFrame) -> str:
    """Losses with intervals over seeds, beside what the groups tell; the best of each number of tokens first."""
    lines = ["| training tokens | head | loss (nats) | group loss | token loss | minus clustered (nats) | p |"]
    lines[0] += " mutual information of groups (nats) | making the order (CPU s) | seeds |"
    lines.append("|---" * 10 + "|")
    for tokens, of_size in runs.groupby("tokens"):
        means = of_size.groupby("head")["validation_loss_nats"].mean().sort_values()
        for head in means.index:
            rows = of_size[of_size["head"] == head]
            cells = [loss_of(rows[name].tolist()) for name in LOSSES]
            cells += difference_of(of_size, str(head))
            (order,) = groups[(groups["head"] == head) & (groups["tokens"] == tokens)].to_dict("records")
            cells += [f"{order['mutual_information_nats']:.3f}", f"{order['order_cpu_seconds']:.0f}", str(len(rows))]
            lines.append(f"| {float(str(tokens)) / 1e6:.2g} M | `{head}` | {' | '.join(cells)} |")
    lines += ["", f"{trained_on(runs)}; the loss is that of the last 1% of the training documents, kept apart. 95%"]
    lines += [
        "intervals over seeds; p: paired t-test. Mutual information of neighbouring tokens' groups in the training"
    ]
    lines += [f"text. {groups['hardware'].iloc[0]}; torch {groups['torch'].iloc[0]}.", ""]
    return "\n".join(lines)


def loss_of(values: list[float]) -> str:
    """The mean, with its interval where there are two or more."""
    mean, half_width = mean_and_interval(values)
    return f"{mean:.3f}" + (f" ± {half_width:.3f}" if len(values) > 1 else "")


def difference_of(of_size: pd.DataFrame, head: str) -> list[str]:
    """The difference to the clustered order over the seeds that both have, and its p."""
    if head == REFERENCE:
        return ["", ""]
    found = difference_over_seeds(of_size, "head", head, REFERENCE)
    if found.count == 0:
        return ["", ""]
    if found.count == 1:
        return [f"{found.mean:+.3f}", ""]
    return [f"{found.mean:+.3f} ± {found.half_width:.3f}", f"{found.p_value:.2g}"]
