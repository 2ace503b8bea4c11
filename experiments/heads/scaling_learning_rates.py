"""The learning rates of heads_scaling, tuned at two budgets on held-out training text, and the rule between the two.

    python -m vocabfold.train --multirun experiment=scaling_learning_rates data=text data.train=FILE data.valid=FILE
    python -m experiments scaling_learning_rates measure
    python -m experiments scaling_learning_rates draw [CORPUS ...]

results/CORPUS/scaling_learning_rates.csv (a row a run) -> .md. conf/experiment/heads_scaling.yaml reads the table by
``scaling_learning_rate`` (vocabfold/runs/settings.py): at a tuned budget the rate with the least loss, between two the
logarithm of the rate on a straight line over the logarithm of the tokens, outside them the nearer one's.
"""

from __future__ import annotations

from argparse import Namespace

import pandas as pd

from experiments.study.collecting import collect_with_settings
from experiments.study.figures import trained_on
from experiments.study.measuring import add_settings
from vocabfold.files import write_text
from vocabfold.runs.settings import UNTUNED_RATE, best_scaling_rates, scaling_learning_rate
from vocabfold.runs.tables import RESULTS, read_table

SHOWN_BUDGETS = (500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000)

add_options = add_settings


def measure(arguments: Namespace) -> None:
    """Gather the finished training runs into results/CORPUS/scaling_learning_rates.csv."""
    collect_with_settings("scaling_learning_rates", arguments.settings)


def draw(corpus: str) -> None:
    """Write the table in words: losses by rate, and the rates that the rule gives."""
    path = RESULTS / corpus / "scaling_learning_rates.md"
    write_text(path, markdown(read_table("scaling_learning_rates", corpus), corpus))
    print(f"wrote {path}")


def markdown(table: pd.DataFrame, corpus: str) -> str:
    """Mean losses on held-out training text by head, budget and rate, the best in bold; then the rule's rates."""
    best = best_scaling_rates(table)
    rates = sorted(table["learning_rate"].unique())
    lines = ["| head | hidden size | tokens | " + " | ".join(f"{rate:g}" for rate in rates) + " | runs |"]
    lines.append("|---" * (len(rates) + 4) + "|")
    edges = []
    for (head, size), chosen in best.items():
        for budget, rate in sorted(chosen.items()):
            rows = table[(table["head"] == head) & (table["hidden_size"] == size)]
            rows = rows[rows["training_tokens"] * rows["epochs"] == budget]
            losses = rows.groupby("learning_rate")["validation_loss_nats"].mean()
            if rate in (losses.index.min(), losses.index.max()):
                edges.append(f"{head} at {budget / 1e6:g} M ({rate:g})")
            cells = [
                "" if one not in losses else f"**{losses[one]:.3f}**" if one == rate else f"{losses[one]:.3f}"
                for one in rates
            ]
            lines.append(f"| {head} | {size} | {budget / 1e6:g} M | " + " | ".join(cells) + f" | {len(rows)} |")
    lines += ["", "Rates that the rule gives:", ""]
    lines.append("| head | hidden size | " + " | ".join(f"{budget / 1e6:g} M" for budget in SHOWN_BUDGETS) + " |")
    lines.append("|---" * (len(SHOWN_BUDGETS) + 2) + "|")
    for head, size in best:
        given = [f"{scaling_learning_rate(corpus, head, size, budget):g}" for budget in SHOWN_BUDGETS]
        lines.append(f"| {head} | {size} | " + " | ".join(given) + " |")
    lines += [
        "",
        f"{trained_on(table).rsplit(';', 1)[0]}. Loss in nats a token on the last documents of the training text, "
        "which these runs did not train on; the validation text chooses nothing. The rule: at a tuned budget the rate "
        "with the least loss; between two the logarithm of the rate on a straight line over the logarithm of the "
        "tokens, rounded to two figures; outside them that of the nearer. Heads and sizes that are not here: "
        f"{UNTUNED_RATE:g}.",
    ]
    if edges:
        lines.append(f"At the edge of what was tried, so that the best may lie beyond: {', '.join(edges)}.")
    return "\n".join([*lines, ""])
