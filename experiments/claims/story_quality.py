"""Table 1 of arXiv 2411.06371: stories judged by a language model."""

from __future__ import annotations

from experiments.claims.base import Claim, Finding, at_least, reference, rows_where, with_columns
from experiments.paper.table1_story_quality import EXPERIMENT
from experiments.paper.table1_words import COUNTERPARTS, MARKS, PUBLISHED_COLUMNS, TRAINED
from vocabfold.errors import UserError
from vocabfold.runs.tables import read_table


def published_ratios(column: str) -> list[float]:
    """The grouped model's published score over GPT-2's, one a hidden size."""
    by_model = reference("table1_published").pivot(index="hidden_size", columns="model", values=column)
    return (by_model["grouped"] / by_model["gpt2"]).tolist()


def stories(corpus: str) -> Finding:
    """For each judge and score that it gives: grouped over full, against the least of the published ratios."""
    path = f"results/{corpus}/{EXPERIMENT}.csv"
    table = with_columns(read_table(EXPERIMENT, corpus), path, ("judge", "writer"))
    table = rows_where(table, path, model="gpt2", writer=TRAINED)
    checks = []
    for judge, rows in table.groupby("judge"):
        for column, quantity in zip(PUBLISHED_COLUMNS, COUNTERPARTS.get(str(judge), MARKS), strict=True):
            if quantity is None or quantity not in rows:
                continue
            means = {head: rows_where(rows, path, head=head)[quantity].mean() for head in ("full", "paper")}
            if any(mean != mean for mean in means.values()):
                continue  # too few mentions to say
            found = f"{judge}, {quantity} {means['paper']:.2f} over {means['full']:.2f}, ratio {{}}"
            ratio, bound = means["paper"] / means["full"], min(published_ratios(column))
            checks.append(at_least(f"{judge}, {quantity}: grouped over full", ratio, bound, "{:.2f}", found))
    if not checks:
        raise UserError(f"{path} holds no score of any judge: measure again")
    return Finding(tuple(checks))


def published() -> str:
    """The range of the published ratios."""
    ratios = [ratio for column in PUBLISHED_COLUMNS for ratio in published_ratios(column)]
    return f"scores {min(ratios):.2f} to {max(ratios):.2f} times those of GPT-2"


CLAIM = Claim(
    "Table 1",
    "Stories written by the grouped model are as good as GPT-2's (grammar, creativity, consistency, plot, age)",
    published,
    stories,
    (
        "{corpus}/table1_story_quality.png",
        "{corpus}/table1_story_quality.md",
        "{corpus}/table1_story_quality.csv",
        "paper/table1_published.csv",
    ),
    f"`python -m experiments {EXPERIMENT} measure`",
)
