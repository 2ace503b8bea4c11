"""How well the language models of arXiv 2411.06371 predict: on par or not, the right half of Figure 3, the order."""

from __future__ import annotations

import pandas as pd

from experiments.claims.base import (
    Check,
    Claim,
    Finding,
    at_least,
    at_most,
    fixed,
    on_par,
    published_extreme,
    rows_where,
    with_columns,
)
from experiments.claims.cost import NEAR_FACTOR, PAPER_HEAD, SAME_SHAPE
from experiments.heads.order_matters import with_plain_orders
from experiments.heads.vocabulary_scaling import quantity_of
from experiments.paper.figure3_group_size import compare_loss
from experiments.paper.main_comparison import MARGIN_NATS, comparisons, read_documents
from experiments.study.figures import of_largest_budget
from experiments.study.statistics import difference_over_seeds
from vocabfold.errors import UserError
from vocabfold.runs.tables import read_table

FULL, FULL_UNTIED = "full", "full_untied"
ZIPF = "zipf"  # the folder of sequences with a Zipf law
BY_FREQUENCY = "scale_shift_frequency"


def quality(model: str, corpus: str) -> Finding:
    """Grouped minus full in validation loss."""
    table = read_table("main_comparison", corpus)
    rows = rows_where(table, f"results/{corpus}/main_comparison.csv", model=model)
    checks = []
    for size, of_size in rows.groupby("hidden_size"):
        difference = difference_over_seeds(of_size, "head", "paper", "full")
        name = f"{corpus}, hidden {size}"
        checks.append(on_par(f"grouped minus full, {name}", difference, f"{name}: "))
    return Finding(tuple(checks))


def quality_by_document(corpus: str) -> Finding:
    """Grouped minus full over the validation documents, the mean of the seeds' models."""
    table = read_table("main_comparison", corpus)
    compared = [one for one in comparisons(table, read_documents(corpus, table)) if one.documents is not None]
    if not compared:
        program = "python -m experiments document_losses measure"
        raise UserError(f"results/{corpus}/document_losses.csv is missing or of too few runs: run {program}")
    checks = []
    for one in compared:
        assert one.documents is not None
        asked = f"{one.name}: upper end over documents at most {MARGIN_NATS:+} nats"
        found = f"{one.name} {one.documents.low:+.3f} to {one.documents.high:+.3f}"
        checks.append(Check(asked, found, one.documents.high <= MARGIN_NATS))
    return Finding(tuple(checks))


def tuned_quality(corpus: str) -> Finding:
    """The paper's head against the full softmax, tied as GPT-2's and with rows of its own, each at its best learning
    rate."""
    path = f"results/{corpus}/heads_pareto.csv"
    table = with_columns(read_table("heads_pareto", corpus), path, ("head",))
    checks = []
    for reference_head in (FULL, FULL_UNTIED):
        for head in (PAPER_HEAD, reference_head):
            rows_where(table, path, head=head)
        difference = difference_over_seeds(table, "head", PAPER_HEAD, reference_head)
        checks.append(on_par(f"{PAPER_HEAD} minus {reference_head}", difference, f"minus {reference_head}: "))
    return Finding(tuple(checks))


def hump(corpus: str) -> Finding:
    """Figure 3, right."""
    table = of_largest_budget(read_table("figure3_group_size", corpus))
    return Finding(tuple(check for text, rows in table.groupby("corpus") for check in hump_checks(rows, str(text))))


def hump_checks(rows: pd.DataFrame, text: str) -> list[Check]:
    """Whether the loss has a hump over the group sizes, where the published one is, of its shape."""
    found = compare_loss(rows)
    sizes, worst = found.curve["group_size"], float(found.ours["group_size"])
    printed = float(found.published["group_size"])
    ratio = max(worst / printed, printed / worst)
    top = f"{text}: worst at S = {worst:,.0f}, {found.ours['mean']:.3f} nats"
    inside = bool(sizes.min() < worst < sizes.max())
    place, shape = "place of the top, as a factor from the published", "correlation with the published points"
    return [
        Check(f"{text}: the loss is worst inside the range of group sizes", top, inside),
        at_most(f"{text}: {place}", ratio, NEAR_FACTOR, "{:.2f}", "factor {}"),
        at_least(f"{text}: {shape}", found.correlation, SAME_SHAPE, "{:.3f}", "correlation {}"),
    ]


def order(corpus: str) -> Finding:
    """Token-id order against frequency order and against chance, the paper's scorer."""
    table = of_largest_budget(with_plain_orders(read_table("order_matters", corpus)))
    return Finding(tuple(order_checks(table, f"results/{corpus}/order_matters.csv")))


def order_checks(table: pd.DataFrame, place: str, text: str = "") -> list[Check]:
    """At every group size the runs have to show that token-id order is no worse than another; ``place``: where the rows
    are from, ``text``: which text and budget, where that is not the report's own."""
    text = f"{text}: " if text else ""
    checks = []
    for other in ("frequency", "random"):
        differences = {
            int(size): difference_over_seeds(table[table["group_size"] == size], "partition_order", "bpe", other)
            for size in sorted(table["group_size"].unique())
        }
        for size in differences:
            for name in ("bpe", other):
                rows_where(table, place, partition_order=name, group_size=size)
        shown = all(difference.high <= MARGIN_NATS for difference in differences.values())
        found = ", ".join(
            f"S = {size}: {found.mean:+.3f} ± {found.half_width:.3f}" for size, found in differences.items()
        )
        asked = (
            f"{text}at every group size token-id order minus {other} order: upper end of the 95% interval at most "
            f"{MARGIN_NATS:+.2f} nats"
        )
        checks.append(Check(asked, f"{text}token ids minus {other}: {found}", shown))
    return checks


def quality_grows_along(_: str) -> Finding:
    """The loss at every vocabulary size that the full softmax was trained at: the paper's scorer in the order that
    BPE's is said to stand for, since the sequences have no merges."""
    path = f"results/{ZIPF}/vocabulary_scaling.csv"
    table = with_columns(read_table("vocabulary_scaling", ZIPF), path, ("head", "vocabulary_size"))
    for head in (BY_FREQUENCY, FULL_UNTIED):
        rows_where(table, path, head=head)
    checks = []
    for size, rows in table.groupby("vocabulary_size"):
        if FULL_UNTIED not in set(rows["head"]):
            continue
        difference = difference_over_seeds(rows, "head", BY_FREQUENCY, FULL_UNTIED, quantity_of(table))
        checks.append(on_par(f"grouped minus full, V = {size:,.0f}", difference, f"V = {size:,.0f}: "))
    return Finding(tuple(checks))


COMPARISON, TUNED, GROUP_SIZES, ORDER = (
    tuple(f"{{corpus}}/{name}{suffix}" for suffix in (".png", ".md", ".csv"))
    for name in ("main_comparison", "heads_pareto", "figure3_group_size", "order_matters")
)
SCALING = tuple(f"{ZIPF}/vocabulary_scaling{suffix}" for suffix in (".png", ".md", ".csv"))
MAKE_PAPER, MAKE_HEADS = "`make paper`", "`make heads`"
CLAIMS = (
    Claim("abstract", "The grouped head is on par with GPT-2", fixed("on par"), lambda corpus: quality("gpt2", corpus),
          COMPARISON, MAKE_PAPER),
    Claim("abstract", "The grouped head is on par with GPT-Neo", fixed("on par"),
          lambda corpus: quality("gpt_neo", corpus), COMPARISON, MAKE_PAPER),
    Claim("abstract", "The same on other documents of the kind (bootstrap over the validation documents)",
          fixed("on par"), quality_by_document, COMPARISON, MAKE_PAPER),
    Claim("abstract", "On par with a full softmax, tied or with rows of its own, each at its best learning rate",
          fixed("on par, one learning rate for all"), tuned_quality, TUNED, MAKE_HEADS),
    Claim("Figure 3, right", "Validation loss has a hump: worst at middle group sizes, better at both ends",
          lambda: published_extreme("figure3_val_loss", "val_loss_nats", True, "nats"), hump, GROUP_SIZES, MAKE_PAPER),
    Claim("method", "The order of BPE's merges stands in for the order by frequency", fixed("assumed, not measured"),
          order, ORDER, MAKE_HEADS),
    Claim("method", "The grouped head stays on par as the vocabulary grows", fixed("on par, at one vocabulary"),
          quality_grows_along, SCALING, MAKE_HEADS),
)  # fmt: skip
