"""The runs of heads_scaling as points: which head, after how many tokens, how far from the best full softmax.

A point is a budget: ``training_tokens`` of the text read ``epochs`` times. Losses are compared over the seeds that both
heads have there. The full softmax that a head is compared with is the best at that budget by its mean loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from experiments.study.statistics import Difference, difference_over_seeds, mean_and_interval, paired_difference
from experiments.study.trends import Trend, trend
from vocabfold.errors import UserError
from vocabfold.measure.speed import tokens_per_second
from vocabfold.runs.settings import rate_by_rule, scaling_rates

FULL = ("full_untied_counts", "full_counts", "full_untied", "full")
NOT_FOLDED = ("adaptive", "chunked", "fused")  # nor full
BUDGET = ["training_tokens", "epochs"]
COLUMNS = ("training_tokens", "epochs", "validation_loss_nats", "flops_per_token", "num_parameters")
ROOT_FACTOR = 2.0  # group sizes nearer to the root of V than this bear the plain name of their head


@dataclass(frozen=True)
class Cost:
    """What a training step costs with a head, in one interleaved measurement: seconds of each round, tokens of a step,
    peak memory."""

    seconds: list[float]
    tokens: int
    peak_memory_gib: float

    @property
    def tokens_per_second(self) -> float:
        """The median of the rounds."""
        return tokens_per_second(self.seconds, self.tokens)


def arm_of(head: str, scorer: object, group_size: float, vocabulary_size: float) -> str:
    """What a line of a picture stands for: the head, with its group size where that is far from the root of V (NaN of
    both: not known)."""
    if not isinstance(scorer, str) or math.isnan(group_size) or math.isnan(vocabulary_size):
        return head
    ratio = group_size / math.sqrt(vocabulary_size)
    return head if 1 / ROOT_FACTOR < ratio < ROOT_FACTOR else f"{head}, S = {group_size:,.0f}"


def points_of(table: pd.DataFrame, hidden_size: int, corpus: str) -> pd.DataFrame:
    """The rows of one hidden size, one a seed and budget, with their ``arm``, ``rate_by_rule`` and whether ``tuned``.

    Of runs that differ in the learning rate alone those stay whose rate is nearest to that of the rule
    (``scaling_learning_rate``): never those that did best on the validation text. Raises UserError where rows of
    another version lack a column, or runs that differ in something else are in the table.
    """
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise UserError(f"heads_scaling.csv has no column {missing[0]}: another version wrote it; measure again")
    rows = table[table["hidden_size"] == hidden_size]
    described = rows.astype({"group_size": float})[["head", "scorer", "group_size", "vocabulary_size"]]
    rows = rows.assign(arm=[arm_of(*one) for one in described.itertuples(index=False, name=None)])
    rates = scaling_rates(corpus)
    wanted = {
        (head, tokens, epochs): rate_by_rule(rates, head, hidden_size, tokens * epochs)
        for head, tokens, epochs in rows[["head", *BUDGET]].drop_duplicates().itertuples(index=False)
    }
    keys = rows[["head", *BUDGET]].itertuples(index=False, name=None)
    tuned = [(head, hidden_size) in rates for head in rows["head"]]
    rows = rows.assign(rate_by_rule=[wanted[key] for key in keys], tuned=tuned)
    distance = (rows["learning_rate"] / rows["rate_by_rule"]).map(math.log).abs()
    nearest = distance.groupby([rows[name] for name in ("arm", *BUDGET)]).transform("min")
    rows = rows[distance <= nearest + 1e-9]
    if (repeated := rows[rows.duplicated(["arm", *BUDGET, "seed"])]).any(axis=None):
        first = repeated.iloc[0]
        raise UserError(
            f"{first['arm']} has several runs of seed {first['seed']} on {first['training_tokens']:,.0f} tokens of "
            f"{corpus}, such as {first['run']}: keep runs of other settings in another experiment"
        )
    return rows.sort_values([*BUDGET, "arm", "seed"], kind="stable")


def budgets_of(points: pd.DataFrame) -> list[tuple[float, float]]:
    """The (training_tokens, epochs) that some run has, by the tokens trained on."""
    budgets = {(float(tokens), float(epochs)) for tokens, epochs in points[BUDGET].itertuples(index=False)}
    return sorted(budgets, key=lambda budget: (budget[0] * budget[1], budget))


def at_budget(points: pd.DataFrame, budget: tuple[float, float]) -> pd.DataFrame:
    """The rows of one budget."""
    return points[(points["training_tokens"] == budget[0]) & (points["epochs"] == budget[1])]


def best_full(points: pd.DataFrame, budget: tuple[float, float]) -> str | None:
    """The full softmax with the least mean loss at a budget; None where none was trained."""
    rows = at_budget(points, budget)
    means = rows[rows["head"].isin(FULL)].groupby("arm")["validation_loss_nats"].mean()
    return str(means.idxmin()) if len(means) else None


def gap(points: pd.DataFrame, arm: str, budget: tuple[float, float], reference: str | None = None) -> Difference | None:
    """Loss of ``arm`` minus that of ``reference`` (None: the best full softmax) at equal tokens, over the seeds that
    both have; None where there is none, and for the reference itself."""
    reference = reference or best_full(points, budget)
    if reference is None or reference == arm:
        return None
    found = difference_over_seeds(at_budget(points, budget), "arm", arm, reference)
    return found if found.count else None


def gap_trend(points: pd.DataFrame, arm: str) -> Trend | None:
    """The line of the gap over log2 tokens, a point a seed and budget; of runs that read each token once."""
    places, values = [], []
    for budget in budgets_of(points):
        reference = best_full(points, budget)
        if budget[1] != 1 or reference is None:
            continue
        rows = at_budget(points, budget)
        losses = rows.pivot(index="seed", columns="arm", values="validation_loss_nats")
        if arm != reference and {arm, reference} <= set(losses.columns):
            differences = (losses[arm] - losses[reference]).dropna().tolist()
            places += [float(rows["tokens"].median())] * len(differences)
            values += differences
    return trend(places, values)


@dataclass(frozen=True)
class Matched:
    """An arm beside the best full softmax of one budget, both at the same cost: the arm's largest budget that costs no
    more, what share of the cost it takes, and the difference of the losses."""

    full_budget: tuple[float, float]
    budget: tuple[float, float]
    share: float
    difference: Difference


def at_equal_cost(points: pd.DataFrame, arm: str, a_token: Mapping[str, float]) -> list[Matched]:
    """For each budget of a full softmax the arm's largest run that costs no more, if it has one; ``a_token``: what a
    training token costs with each arm (seconds, FLOPs). Nothing is interpolated between runs."""
    found = []
    budgets = budgets_of(points)
    for full_budget in budgets:
        full = best_full(points, full_budget)
        if full is None or full not in a_token or arm not in a_token:
            continue
        whole = a_token[full] * math.prod(full_budget)
        full_rows = at_budget(points, full_budget)
        full_loss = full_rows[full_rows["arm"] == full].set_index("seed")["validation_loss_nats"]
        affordable = [one for one in budgets if a_token[arm] * math.prod(one) <= whole * (1 + 1e-9)]
        for budget in reversed(affordable):
            rows = at_budget(points, budget)
            loss = rows[rows["arm"] == arm].set_index("seed")["validation_loss_nats"]
            seeds = loss.index.intersection(full_loss.index)
            if len(seeds):
                difference = paired_difference(loss[seeds].tolist(), full_loss[seeds].tolist())
                share = a_token[arm] * math.prod(budget) / whole
                found.append(Matched(full_budget, budget, share, difference))
                break
    return found


def flops_a_token(points: pd.DataFrame) -> dict[str, float]:
    """Training FLOPs a token of each arm."""
    return {str(arm): float(value) for arm, value in points.groupby("arm")["flops_per_token"].median().items()}


def costs_of(timed: pd.DataFrame | None, hidden_size: int) -> dict[str, Cost]:
    """What was measured of each arm, and of no head, at one hidden size; nothing where nothing was timed."""
    if timed is None:
        return {}
    rows = timed[timed["hidden_size"] == hidden_size]
    return {
        str(method): Cost(
            one.sort_values("round")["seconds"].tolist(),
            int(one["tokens"].iloc[0]),
            float(one["peak_memory_gib"].iloc[0]),
        )
        for method, one in rows.groupby("method")
    }


def folded_arms(points: pd.DataFrame) -> list[str]:
    """The arms that fold the vocabulary, the least loss at the largest budget first."""
    folded = points[~points["head"].isin([*FULL, *NOT_FOLDED])]
    return [arm for arm in arms_by_loss(points) if arm in set(folded["arm"])]


def arms_by_loss(points: pd.DataFrame) -> list[str]:
    """All arms, those with the largest budgets first and of these the least loss."""
    keys = {}
    for arm, rows in points.groupby("arm"):
        largest = budgets_of(rows)[-1]
        keys[str(arm)] = (-math.prod(largest), float(at_budget(rows, largest)["validation_loss_nats"].mean()))
    return sorted(keys, key=lambda arm: keys[arm])


def loss_at(points: pd.DataFrame, arm: str, budget: tuple[float, float], column: str) -> tuple[float, float, int]:
    """(mean of a column, half width of its 95% interval, seeds) of an arm at a budget; NaN without a run."""
    rows = at_budget(points, budget)
    values = rows.loc[rows["arm"] == arm, column].dropna().tolist()
    return (*mean_and_interval(values), len(values)) if values else (math.nan, math.nan, 0)
