"""Table 1 of arXiv 2411.06371: stories judged by a language model."""

from __future__ import annotations

from claims.base import Claim, Finding, at_least, reference, rows_where, with_columns
from vocabfold.errors import UserError
from vocabfold.records import read_table

NAME = "table1_story_quality"
TRAINED = "trained"  # the writers that are compared, beside references and half-trained models
# Columns of the judges' scores, and the published score that each comes nearest to.
COUNTERPARTS = {
    "grammar_of_10": "grammar",
    "creativity_of_10": "creativity",
    "consistency_of_10": "consistency",
    "plot_of_10": "plot",
    "age_years": "age",
    "words_told_share": "grammar",
    "well_formed_share": "grammar",
    "new_sentences_share": "creativity",
    "consistency_share": "consistency",
    "names_kept_share": "consistency",
    "plot_words_share": "plot",
}
QUANTITIES = ("grammar", "creativity", "consistency", "plot", "age")


def published_ratios(quantity: str) -> list[float]:
    """The grouped model's published score over GPT-2's, one a hidden size."""
    by_model = reference(NAME).pivot(index="hidden_size", columns="model", values=quantity)
    return (by_model["grouped"] / by_model["gpt2"]).tolist()


def stories(scale: str) -> Finding:
    """For each judge and score: grouped over full, against the least of the published ratios."""
    path = f"results/{scale}/{NAME}.csv"
    table = with_columns(read_table(NAME, scale), path, ("judge", "writer"))
    table = rows_where(table, path, model="gpt2", writer=TRAINED)
    scored = [column for column in COUNTERPARTS if column in table]
    if not scored:
        raise UserError(f"{path} has none of the columns {', '.join(COUNTERPARTS)}: another version wrote it")
    checks = []
    for judge, rows in table.groupby("judge"):
        for column in scored:
            means = {head: rows_where(rows, path, head=head)[column].mean() for head in ("full", "grouped")}
            if any(mean != mean for mean in means.values()):
                continue  # a judge that does not give this score
            bound = min(published_ratios(COUNTERPARTS[column]))
            found = f"{judge}, {column} {means['grouped']:.2f} over {means['full']:.2f}, ratio {{}}"
            ratio = means["grouped"] / means["full"]
            checks.append(at_least(f"{judge}, {column}: grouped over full", ratio, bound, "{:.2f}", found))
    if not checks:
        raise UserError(f"{path} holds no score of any judge: run `make reproduce SCALE={scale}` again")
    return Finding(tuple(checks))


def published() -> str:
    """The range of the published ratios."""
    ratios = [ratio for quantity in QUANTITIES for ratio in published_ratios(quantity)]
    return f"scores {min(ratios):.2f} to {max(ratios):.2f} times those of GPT-2"


CLAIM = Claim(
    "Table 1",
    "Stories written by the grouped model are as good as GPT-2's (grammar, creativity, consistency, plot, age)",
    published,
    stories,
    (
        "{scale}/table1_story_quality.png",
        "{scale}/table1_story_quality.md",
        "{scale}/table1_story_quality.csv",
        "paper/table1_story_quality.csv",
    ),
    f"`python experiments/{NAME}.py --measure {{scale}}`",
)
