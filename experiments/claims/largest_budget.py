"""The claims of arXiv 2411.06371 on real text at the largest budget that was run, whatever text that is.

The same in the report on every text: each looks for the table with the most training tokens that can decide it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pandas as pd

from experiments.claims.base import Check, Claim, Finding, at_least, fixed, on_par, published_extreme
from experiments.claims.quality import hump_checks, order_checks
from experiments.heads.order_matters import FAILURE, with_plain_orders
from experiments.heads.scaling_points import at_budget, best_full, budgets_of, gap, points_of
from experiments.study.figures import corpora_with
from vocabfold.errors import UserError
from vocabfold.runs.tables import read_table

PAPER_HEAD, TIED = "paper", "full_counts"
NO_REAL_TEXT = ("zipf", "stories")
LEAST_SEEDS, LEAST_SIZES = 2, 5
REAL_TEXT = ("wikipedia", "books", "wikipedia-books")  # whose files and commands are named as evidence


def largest(name: str, decides: Callable[[pd.DataFrame], bool]) -> tuple[str, pd.DataFrame]:
    """(text, rows) of the largest budget that some text's table NAME has and that ``decides``. Raises UserError where
    there is none."""
    found: list[tuple[float, str, pd.DataFrame]] = []
    for corpus in corpora_with(name):
        if corpus in NO_REAL_TEXT:
            continue
        with contextlib.suppress(UserError):  # of another version: another text's may decide
            budgets = read_table(name, corpus).groupby("tokens")
            found += [(float(str(tokens)), corpus, rows) for tokens, rows in budgets if decides(rows)]
    if not found:
        raise UserError(f"results/*/{name}.csv: missing, or too few runs on real text: train experiment={name} on one")
    _, corpus, rows = max(found, key=lambda one: one[:2])
    return corpus, rows


def title_of(corpus: str, rows: pd.DataFrame) -> str:
    """Which budget of which text."""
    return f"{corpus}, {rows['tokens'].iloc[0] / 1e6:.1f} M tokens"


def quality_at_most_tokens(_: str) -> Finding:
    """The paper's head against the best full softmax and the tied one, at the largest budget of each hidden size that
    two seeds of both have."""
    checks: list[Check] = []
    tables = scaling_tables()
    sizes = {int(size) for table in tables.values() for size in table["hidden_size"]}
    for size in sorted(sizes):
        checks += on_par_at_size(tables, size)
    if not checks:
        raise UserError(
            "results/*/heads_scaling.csv: missing, or no two seeds of the paper's head and a full softmax at one "
            "budget: train experiment=heads_scaling head=paper,full_untied_counts"
        )
    return Finding(tuple(checks))


def scaling_tables() -> dict[str, pd.DataFrame]:
    """heads_scaling of each text that has it; a table of another version decides nothing."""
    tables = {}
    for corpus in corpora_with("heads_scaling"):
        with contextlib.suppress(UserError):
            tables[corpus] = read_table("heads_scaling", corpus)
    return tables


def on_par_at_size(tables: dict[str, pd.DataFrame], hidden_size: int) -> list[Check]:
    """The checks of one hidden size at its largest budget; none where no budget has two seeds."""
    found = []
    for corpus, table in tables.items():
        if hidden_size not in set(table["hidden_size"]):
            continue
        points = points_of(table, hidden_size, corpus)
        for budget in budgets_of(points):
            arms = sorted(set(at_budget(points, budget)["arm"]))
            own = [arm for arm in arms if arm.split(",")[0] == PAPER_HEAD]
            compared = [
                arm for arm in own if (one := gap(points, arm, budget)) is not None and one.count >= LEAST_SEEDS
            ]
            if compared:
                found.append((budget[0] * budget[1], corpus, points, budget, compared))
    if not found:
        return []
    tokens, corpus, points, budget, compared = max(found, key=lambda one: one[:2])
    place = f"{corpus}, hidden {hidden_size}, {tokens / 1e6:g} M tokens"
    checks = []
    for arm in compared:
        for reference in dict.fromkeys((best_full(points, budget), TIED)):
            difference = gap(points, arm, budget, reference)
            if difference is not None and difference.count >= LEAST_SEEDS:
                name = f"{place}, {arm} minus {reference}"
                checks.append(on_par(name, difference, f"{name}: "))
    return checks


def hump_at_most_tokens(_: str) -> Finding:
    """Figure 3, right."""
    corpus, rows = largest("figure3_group_size", lambda rows: rows["group_size"].nunique() >= LEAST_SIZES)
    return Finding(tuple(hump_checks(rows, title_of(corpus, rows))))


def group_accuracy_at_most_tokens(_: str) -> Finding:
    """How often the likeliest group is the right one, with the paper's head, at the largest budget that each of its
    sizes has."""
    tables = [table for corpus, table in scaling_tables().items() if corpus not in NO_REAL_TEXT]
    runs = pd.concat([table[table["head"] == PAPER_HEAD] for table in tables]) if tables else pd.DataFrame()
    if runs.empty:
        raise UserError("results/*/heads_scaling.csv: no run of the paper's head: train experiment=heads_scaling")
    checks = []
    for (size, group_size), of_size in runs.groupby(["hidden_size", "group_size"]):
        most = of_size[of_size["tokens"] == of_size["tokens"].max()]
        corpus = most["corpus"].max()
        rows = most[most["corpus"] == corpus]
        name = f"{title_of(corpus, rows)}, hidden {size}, S = {group_size:,.0f}"
        checks.append(at_least(name, rows["group_accuracy"].mean(), FAILURE, "{:.3f}", f"{name}: {{}}"))
    return Finding(tuple(checks))


def order_at_most_tokens(_: str) -> Finding:
    """Token-id order against frequency order and chance, which one seed of each does not decide."""

    def decides(rows: pd.DataFrame) -> bool:
        seeds = with_plain_orders(rows).groupby("partition_order")["seed"].nunique()
        return all(seeds.get(order, 0) >= LEAST_SEEDS for order in ("bpe", "frequency", "random"))

    corpus, rows = largest("order_matters", decides)
    title = title_of(corpus, rows)
    return Finding(tuple(order_checks(with_plain_orders(rows), f"results/{corpus}/order_matters.csv", title)))


def evidence(name: str) -> tuple[str, ...]:
    """The files of an experiment on the larger texts."""
    return tuple(f"{corpus}/{name}{suffix}" for corpus in REAL_TEXT for suffix in (".png", ".md", ".csv"))


LARGEST = "on real text, at the largest budget run"
CLAIMS = (
    Claim("abstract", f"The grouped head is on par with the full softmax, {LARGEST}", fixed("on par"),
          quality_at_most_tokens, evidence("heads_scaling"),
          "`python -m vocabfold.train --multirun experiment=heads_scaling`"),
    Claim("Figure 3, right", f"The loss has a hump over group sizes, {LARGEST}",
          lambda: published_extreme("figure3_val_loss", "val_loss_nats", True, "nats"), hump_at_most_tokens,
          evidence("figure3_group_size"),
          "`python -m vocabfold.train --multirun experiment=figure3_group_size budget=scaling`"),
    Claim("method", f"The likeliest group is the right one, as on pictures, {LARGEST}",
          fixed("0.9 or more, on pictures"), group_accuracy_at_most_tokens, evidence("heads_scaling"),
          "`python -m vocabfold.train --multirun experiment=heads_scaling head=paper`"),
    Claim("method", f"The order of BPE's merges stands in for the order by frequency, {LARGEST}",
          fixed("assumed, not measured"), order_at_most_tokens, evidence("order_matters"),
          "`python -m vocabfold.train --multirun experiment=order_matters budget=scaling`"),
)  # fmt: skip
