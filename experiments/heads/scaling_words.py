"""The table of heads_scaling in words: losses, gaps, trends, equal time and FLOPs, the goals, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from experiments.heads.heads_cost import NO_HEAD
from experiments.heads.scaling_points import (
    BUDGET,
    FULL,
    Cost,
    Matched,
    arms_by_loss,
    at_budget,
    at_equal_cost,
    best_full,
    budgets_of,
    flops_a_token,
    folded_arms,
    gap,
    gap_trend,
    loss_at,
)
from experiments.study.statistics import LEVEL, Difference, in_words
from experiments.study.trends import Trend
from vocabfold.measure.speed import ratio_summary

Budget = tuple[float, float]
# What a folded head is wanted to reach beside the best full softmax at equal tokens.
MOST_RATIO, MOST_RATIO_HIGH, LEAST_SPEED, MOST_MEMORY = 1.00, 1.01, 5.0, 1.1
NAMES = {
    "full_untied_counts": "full softmax, untied, count biases",
    "full_counts": "full softmax, tied as GPT-2 has it, count biases",
    "adaptive": "adaptive softmax (torch)",
    "paper": "the paper's: one shared layer, a scale and a shift a group",
    "paper, S = 3,866": "the paper's with 13 large groups",
    "linear_clustered": "one linear layer a group, clustered",
    "linear_clustered_counts": "one linear layer a group, clustered, count biases",
    "conditioned_exchanged": "one linear layer a group that sees its group first, groups by exchange, count biases",
    "conditioned_exchanged_wide": (
        "one linear layer a group that sees its group first, groups by exchange, read from more than h, count biases"
    ),
    "conditioned_tied_wide": (
        "one linear layer a group that sees its group first, groups by exchange, read from more than h, tied"
    ),
    "conditioned_tied": "one linear layer a group that sees its group first, groups by exchange, tied, count biases",
    "conditioned_clustered": "one linear layer a group that sees its group first, clustered, count biases",
}
SEVERAL = 3  # seeds, with which a headline has an interval that says something
MANY_TOKENS = 1e12  # beyond which a number says nothing


def caption(points: pd.DataFrame, least: str = "two") -> str:
    """What was trained, how often; ``least``: seeds from which on there is an interval."""
    first = points.iloc[0]
    seeds = points.groupby(["arm", "training_tokens", "epochs"])["seed"].nunique()
    counts = f"{seeds.min()} to {seeds.max()} seeds" if seeds.min() < seeds.max() else f"{seeds.max()} seeds"
    counts = "1 seed" if seeds.max() == 1 else counts
    return (
        f"{first['corpus']}; hidden {first['hidden_size']:.0f}, {first['num_layers']:.0f} layers; "
        f"{counts} a point, 95% intervals over seeds where there are {least} or more; {len(points)} runs"
    )


def named(budget: Budget) -> str:
    """A budget in a word: 4 M, or 1.66 M x 2 for a text read twice."""
    return f"{budget[0] / 1e6:.4g} M" + ("" if budget[1] == 1 else f" x {budget[1]:g}")


def row_of(*cells: str) -> str:
    """A line of a markdown table."""
    return "| " + " | ".join(cells) + " |"


def header_of(*cells: str) -> list[str]:
    """The head of a markdown table."""
    return [row_of(*cells), "|---" * len(cells) + "|"]


def difference_of(found: Difference) -> str:
    """A difference with its interval, or with one pair without."""
    return f"{found.mean:+.3f}" + ("" if math.isnan(found.half_width) else f" ± {found.half_width:.3f}")


def ratio_of(found: Difference) -> str:
    """A difference of losses as a ratio of perplexities with its interval."""
    middle = f"{math.exp(found.mean):.3f}"
    if math.isnan(found.half_width):
        return f"{middle} (one seed)"
    return f"{middle} ({math.exp(found.low):.3f} to {math.exp(found.high):.3f})"


def markdown(points: pd.DataFrame, costs: Mapping[str, Cost], corpus: str) -> str:
    """Everything about one hidden size."""
    size = int(points["hidden_size"].iloc[0])
    lines = [f"## {corpus}, hidden {size}", "", f"{caption(points)}.", ""]
    for section in (headline, losses, gaps, trends, goals, equal_costs, steps):
        lines += [*section(points, costs), ""]
    return "\n".join([*lines, *notes(points, costs), ""])


def headline(points: pd.DataFrame, costs: Mapping[str, Cost]) -> list[str]:
    """Every head at the largest budget at which a folded head and a full softmax have several seeds, or one seed where
    none has: loss, perplexity ratio, speed and memory."""
    counts = {
        budget: max((one.count for arm in folded_arms(points) if (one := gap(points, arm, budget))), default=0)
        for budget in budgets_of(points)
    }
    enough = [budget for budget, count in counts.items() if count >= min(SEVERAL, max(counts.values()))]
    if not max(counts.values()):
        return ["No budget has both a full softmax and a folded head."]
    budget = enough[-1]
    full = best_full(points, budget)
    several = (
        f"with {SEVERAL} seeds or more of both sides" if counts[budget] >= SEVERAL else "with both sides, few seeds"
    )
    lines = [f"At {named(budget)} tokens, the largest budget {several}:", ""]
    lines += header_of("head", "setting", "loss", "perplexity, best full = 1 (95%)", "speed", "GiB")
    arms = set(at_budget(points, budget)["arm"])
    rows = {arm: loss_at(points, arm, budget, "validation_loss_nats") for arm in arms_by_loss(points) if arm in arms}
    for arm, (mean, half_width, _) in sorted(rows.items(), key=lambda item: item[1][0]):
        found = gap(points, arm, budget)
        ratio = "1" if arm == full else "" if found is None else ratio_of(found)
        speed = memory = "not measured"
        if arm in costs:
            memory = f"{costs[arm].peak_memory_gib:.3f}"
            if full is not None and full in costs:
                speed = f"{ratio_summary({name: costs[name].seconds for name in (arm, full)}, full, arm).median:.1f}"
        head = points.loc[points["arm"] == arm, "head"].iloc[0]
        loss = in_words(mean, half_width)
        lines.append(row_of(NAMES.get(arm, arm), f"`head={head}`", loss, ratio, speed, memory))
    return lines


def losses(points: pd.DataFrame, _: Mapping[str, Cost]) -> list[str]:
    """Mean loss, interval and seeds of each arm at each budget."""
    budgets = budgets_of(points)
    lines = ["Validation loss (nats a token; seeds in brackets) after so many training tokens:", ""]
    lines += header_of("head", *map(named, budgets))
    for arm in arms_by_loss(points):
        cells = []
        for budget in budgets:
            mean, half_width, seeds = loss_at(points, arm, budget, "validation_loss_nats")
            width = "" if math.isnan(half_width) else f" ± {half_width:.3f}"
            cells.append(f"{mean:.3f}{width} ({seeds})" if seeds else "not run")
        lines.append(row_of(f"`{arm}`", *cells))
    return lines


def gaps(points: pd.DataFrame, _: Mapping[str, Cost]) -> list[str]:
    """Each arm's perplexity over that of the best full softmax at equal tokens."""
    budgets = [budget for budget in budgets_of(points) if best_full(points, budget) is not None]
    if not budgets:
        return ["No full softmax was trained at any budget, so there is nothing to compare with."]
    lines = ["Perplexity over that of the best full softmax at equal tokens, paired by seed (95%):", ""]
    lines += header_of("head", *map(named, budgets))
    for arm in arms_by_loss(points):
        cells = []
        for budget in budgets:
            found = gap(points, arm, budget) if arm in set(at_budget(points, budget)["arm"]) else None
            is_best = arm == best_full(points, budget)
            cells.append("1 (the best full)" if is_best else "" if found is None else ratio_of(found))
        lines.append(row_of(f"`{arm}`", *cells))
    return lines


def trends(points: pd.DataFrame, _: Mapping[str, Cost]) -> list[str]:
    """The slope of each folded arm's gap over log tokens, and where its line meets zero."""
    lines = [
        "The gap in nats (loss minus that of the best full softmax; below 0 the head is ahead) as a straight line over "
        "log tokens, a point a seed and budget, each token read once:",
        "",
        *header_of("head", "change for twice the tokens (95%)", "p", "p of a bend", "points", "the line meets zero"),
    ]
    for arm in folded_arms(points):
        if (line := gap_trend(points, arm)) is None:
            lines.append(row_of(f"`{arm}`", "too few points", "", "", "", ""))
            continue
        bend = "" if math.isnan(line.curvature_p) else f"{line.curvature_p:.2g}"
        slope = f"{line.slope:+.4f} ± {line.half_width:.4f}"
        lines.append(row_of(f"`{arm}`", slope, f"{line.p_value:.2g}", bend, str(line.count), meeting(line)))
    return lines


def meeting(line: Trend) -> str:
    """Where a line meets zero, in words, and whether that lies beyond what was trained."""
    if line.p_value > LEVEL:
        return "its slope cannot be told from 0: nowhere that these points could say"
    found = line.crossing()
    if found.place > MANY_TOKENS:
        return f"beyond {MANY_TOKENS / 1e6:,.0f} M tokens: nowhere that could be trained"
    if found.place < line.lowest:
        return "before the smallest budget"
    words = f"at {millions(found.place)} tokens ({millions(found.low)} to {millions(found.high)})"
    if found.place > line.highest:
        return f"{words}: **extrapolated**, {found.place / line.highest:,.1f} times the largest budget"
    return f"{words}, within what was trained"


def millions(tokens: float) -> str:
    """A number of tokens that a line gave."""
    return f"{tokens / 1e6:,.1f} M" if tokens < MANY_TOKENS else f"{MANY_TOKENS / 1e6:,.0f} M and more"


def goals(points: pd.DataFrame, costs: Mapping[str, Cost]) -> list[str]:
    """What each folded arm reaches of what is wanted, at its largest budget with several seeds, or with as many as it
    has, of a full softmax beside it."""
    lines = ["What is wanted of a folded head beside the best full softmax:", ""]
    lines += header_of(
        "head", "at", f"perplexity ratio (at most {MOST_RATIO:.2f}, upper end {MOST_RATIO_HIGH:.2f})",
        f"training speed (at least {LEAST_SPEED:g})", f"peak memory, no head = 1 (at most {MOST_MEMORY:g})",
        "gap grows with log tokens", "ahead at equal time",
    )  # fmt: skip
    for arm in folded_arms(points):
        compared = [
            (budget, found)
            for budget in budgets_of(points)
            if arm in set(at_budget(points, budget)["arm"]) and (found := gap(points, arm, budget)) is not None
        ]
        if not compared:
            lines.append(row_of(f"`{arm}`", "no full softmax beside it", *[""] * 5))
            continue
        most = min(SEVERAL, max(found.count for _, found in compared))
        budget, found = [pair for pair in compared if pair[1].count >= most][-1]
        met = math.exp(found.mean) <= MOST_RATIO and math.exp(found.high) <= MOST_RATIO_HIGH
        verdict = "undecided with one seed" if math.isnan(found.high) else yes(met)
        ratio = f"{ratio_of(found)}, {verdict}"
        lines.append(row_of(f"`{arm}`", named(budget), ratio, *cost_goals(points, costs, arm, budget)))
    return lines


def cost_goals(points: pd.DataFrame, costs: Mapping[str, Cost], arm: str, budget: Budget) -> list[str]:
    """Speed, memory, slope and equal time of one folded arm."""
    full, line = best_full(points, budget), gap_trend(points, arm)
    speed = memory = ahead = "not measured"
    if arm in costs and full is not None and full in costs:
        found = ratio_summary({name: costs[name].seconds for name in (arm, full)}, full, arm)
        speed = f"{found.median:.1f} ({found.low:.1f} to {found.high:.1f}), {yes(found.median >= LEAST_SPEED)}"
    if arm in costs and NO_HEAD in costs:
        share = costs[arm].peak_memory_gib / costs[NO_HEAD].peak_memory_gib
        memory = f"{share:.2f}, {yes(share <= MOST_MEMORY)}"
    seconds = {name: 1 / cost.tokens_per_second for name, cost in costs.items()}
    if matched := at_equal_cost(points, arm, seconds):
        ahead = yes(all(one.difference.mean < 0 for one in matched))
    if line is None:
        return [speed, memory, "too few points", ahead]
    grows = line.p_value <= LEVEL and line.slope > 0
    slope = "undecided" if line.p_value > LEVEL else f"{'yes' if grows else 'no'} ({line.slope:+.3f} for twice)"
    return [speed, memory, slope, ahead]


def yes(met: bool) -> str:
    """A verdict."""
    return "met" if met else "**not met**"


def equal_costs(points: pd.DataFrame, costs: Mapping[str, Cost]) -> list[str]:
    """Each folded arm's largest run that takes no more time, or FLOPs, than the best full softmax's."""
    seconds = {arm: 1 / cost.tokens_per_second for arm, cost in costs.items()}
    lines = []
    for words, a_token in (("time", seconds), ("training FLOPs", flops_a_token(points))):
        table = {arm: at_equal_cost(points, arm, a_token) for arm in folded_arms(points)}
        budgets = sorted({one.full_budget for found in table.values() for one in found}, key=math.prod)
        if not budgets:
            lines += [f"At equal {words}: not measured.", ""]
            continue
        lines += [
            f"At equal {words}: loss of the head's largest run that takes no more than the best full softmax's, minus "
            "the latter's loss (in brackets the head's tokens, and what share of the other's " + words + " they take):",
            "",
            *header_of("head", *(f"full softmax after {named(budget)}" for budget in budgets)),
        ]
        for arm, found in table.items():
            matched = {one.full_budget: one for one in found}
            lines.append(row_of(f"`{arm}`", *(matched_cell(matched.get(budget)) for budget in budgets)))
        lines.append("")
    return lines[:-1]


def matched_cell(one: Matched | None) -> str:
    """A difference at equal cost, or nothing."""
    return "" if one is None else f"{difference_of(one.difference)} ({named(one.budget)}, {one.share:.0%})"


def steps(points: pd.DataFrame, _: Mapping[str, Cost]) -> list[str]:
    """The loss of the groups and that of the tokens given the group, of folded heads."""
    columns = ("validation_group_loss", "validation_token_loss", "group_accuracy")
    if not set(columns) <= set(points.columns):
        return ["No run tells the losses of its two steps."]
    budgets = budgets_of(points)
    lines = [
        "Loss of the groups + loss of the tokens given the group (nats), group accuracy; means over seeds:",
        "",
    ]
    lines += header_of("head", *map(named, budgets))
    for arm in arms_by_loss(points):
        if points.loc[points["arm"] == arm, columns[0]].isna().all():
            continue
        cells = []
        for budget in budgets:
            group, token, accuracy = (loss_at(points, arm, budget, column)[0] for column in columns)
            cells.append("" if math.isnan(group) else f"{group:.3f} + {token:.3f}, {accuracy:.3f}")
        lines.append(row_of(f"`{arm}`", *cells))
    return lines


def notes(points: pd.DataFrame, costs: Mapping[str, Cost]) -> list[str]:
    """Rates, what is missing, and how it was measured."""
    budgets, arms = budgets_of(points), arms_by_loss(points)
    missing = []
    for arm in arms:
        lacking = [named(one) for one in budgets if arm not in set(at_budget(points, one)["arm"])]
        if lacking:
            missing.append(f"`{arm}` at {', '.join(lacking)}")
    missing += [f"a full softmax ({' or '.join(FULL[:2])})"] if not set(FULL) & set(points["head"]) else []
    untimed = [f"`{arm}`" for arm in arms if arm not in costs]
    rates = points.groupby("arm")["learning_rate"].agg(lambda values: sorted(set(values)))
    told = "; ".join(f"`{arm}` " + ", ".join(f"{rate:g}" for rate in rates[arm]) for arm in arms)
    lines = [f"Learning rates: {told}."]
    by_hand = [f"`{arm}`" for arm in arms if not points.loc[points["arm"] == arm, "tuned"].all()]
    lines += [f"Rates not tuned here: {', '.join(by_hand)}."] if by_hand else []
    off = points[(points["learning_rate"] - points["rate_by_rule"]).abs() > 1e-9]
    others = off[["arm", *BUDGET, "learning_rate", "rate_by_rule"]].drop_duplicates().itertuples(index=False)
    untuned = [f"`{one[0]}` at {named(one[1:3])} ({one[3]:g}, by the rule {one[4]:g})" for one in others]
    lines += [f"Not at the rate of the rule: {'; '.join(untuned)}."] if untuned else []
    lines += [f"Not run: {'; '.join(missing)}."] if missing else []
    lines += [f"Speed not measured: {', '.join(untimed)}."] if untimed else []
    speeds = "; ".join(
        f"`{arm}` {cost.tokens_per_second:,.0f} tokens/s, {cost.peak_memory_gib:.3f} GiB"
        for arm, cost in sorted(costs.items(), key=lambda item: -item[1].tokens_per_second)
    )
    lines += [f"One interleaved run of whole training steps: {speeds}."] if speeds else []
    hardware = f"{points['hardware'].iloc[0]}; torch {points['torch'].iloc[0]}"
    lines.append(
        "Intervals over seeds: Student's t. The best full softmax is chosen at each budget by its own validation loss, "
        "which favours it. Each budget is a run of its own with a schedule of its own; nothing is interpolated. "
        f"{hardware}."
    )
    return lines
