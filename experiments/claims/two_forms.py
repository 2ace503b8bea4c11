"""Figures 4 and 5 of arXiv 2411.06371: a layer a group in a loop, or one shared layer with a scale and a shift."""

from __future__ import annotations

from experiments.claims.base import Check, Claim, Finding, fixed, measured, rows_where
from vocabfold.measure.speed import ratio_summary

NAME = "figure45_loop_or_shared"
LOOP, SHARED = "linear_looped", "scale_shift"
TRAINED = "forward and backward"


def loop_or_shared(corpus: str) -> Finding:
    """The loop's time over the shared layer's at every size."""
    columns = ("corpus", "tokens", "group_size", "scorer", "pass", "round", "seconds")
    table = measured("cost", NAME, f"python -m experiments {NAME} measure", columns)
    table = rows_where(table, f"results/cost/{NAME}.csv", **{"pass": TRAINED})
    texts = table["corpus"].unique()  # timed with the tokens of a text; of any where this one was not timed
    table = table[table["corpus"] == (corpus if corpus in texts else texts[0])]
    checks = []
    for (tokens, size), rows in table.groupby(["tokens", "group_size"]):
        seconds = {str(name): of.sort_values("round")["seconds"].tolist() for name, of in rows.groupby("scorer")}
        ratio = ratio_summary(seconds, LOOP, SHARED).median
        name = f"N = {tokens:,}, S = {size:,}"
        checks.append(Check(f"{name}: the loop takes longer (ratio above 1)", f"{name}: {ratio:.2f}", ratio > 1))
    return Finding(tuple(checks))


CLAIM = Claim(
    "Figures 4 and 5",
    "One shared layer with a scale and a shift a group is faster than a loop over a layer a group",
    fixed("fast and slow, without numbers"),
    loop_or_shared,
    tuple(f"cost/{NAME}{suffix}" for suffix in (".png", ".md", ".csv")),
    f"`python -m experiments {NAME} measure`",
)
