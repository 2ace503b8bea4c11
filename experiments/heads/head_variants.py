"""What each part of a head and of its groups is worth: loss of the groups and of the tokens, by variant.

    python -m vocabfold.train --multirun experiment=head_variants data=text data.train=FILE data.valid=FILE
    python -m experiments head_variants measure [KEY=VALUE ...]
    python -m experiments head_variants draw [CORPUS ...]

results/CORPUS/head_variants.csv -> head_variants.md. Variants that are settings of another head carry a name of their
own: conf/experiment/head_variants.yaml has them all. The losses are on the last hundredth of the
training documents, which no run has seen: the validation text is left for the head that is chosen here.
"""

from __future__ import annotations

from argparse import Namespace

import pandas as pd

from experiments.study.measuring import add_settings, collect_runs
from experiments.study.statistics import summarise
from vocabfold.files import write_text
from vocabfold.runs.tables import RESULTS, read_table

BASE = "linear_clustered_counts"  # one linear layer a group, which sees no group
VARIANTS = {
    BASE: "one linear layer a group, biases from counts",
    "conditioned_clustered": "the token step sees the group: h + W2 gelu(W1 norm(h) + e)",
    "conditioned_residual": "and the groups are scored from h + W2' gelu(W1' norm(h) + b)",
    "conditioned_wide": "and the groups are scored from h beside gelu(W1' norm(h) + b)",
    "conditioned_shared": "and the groups read through the tokens' network, with an e for no group",
    "conditioned_scaled": "what the network adds, times a quarter",
    "conditioned_spread": "e starts as normal(0, 0.5), not 0.02",
    "conditioned_gated": "each group also multiplies the network's inner numbers",
    "conditioned_detached": "the network has no say in what the backbone learns",
    "conditioned_narrow": "the network is as narrow as h",
    "mixture_clustered": "a mixture of two linear heads, clustered by the tokens before and after",
    "conditioned_exchanged": "the token step sees the group, 224 groups learned by exchange",
    "conditioned_exchanged_450": "the token step sees the group, 112 groups learned by exchange",
    "linear_exchanged_counts": "224 groups learned by exchange",
    "linear_exchanged_450": "112 groups learned by exchange",
    "linear_exchanged_900": "56 groups learned by exchange",
    "linear_exchanged_more_counts": "399 groups learned by exchange",
    "linear_rising_counts": "224 groups of rising sizes, clustered within octaves of the ranks",
    "linear_rising_more_counts": "399 groups of rising sizes, clustered within octaves of the ranks",
    "linear_exchanged_rising_counts": "224 groups of rising sizes, exchanged within octaves of the ranks",
    "linear_exchanged_rising_more_counts": "399 groups of rising sizes, exchanged within octaves of the ranks",
    "linear_reclustered_counts": "clustered by the embedding of a linear head trained on 0.5 M tokens",
    "linear_reclustered_tied_counts": "clustered by the tied rows of a linear head trained on 0.5 M tokens",
    "linear_reclustered_exchanged_counts": "clustered by the tied rows of such a head, then exchanged",
    "mixture_exchanged": "a mixture of two linear heads, of learned groups and of clustered ones",
    "cx_base": "`conditioned_exchanged`",
    "cx_wide": "`conditioned_exchanged_wide`: groups scored from h beside gelu(W1' norm(h) + b)",
    "cx_wide512": "`conditioned_exchanged_wide` with a network of 512, not 256",
    "cx_wide_spread": "`conditioned_exchanged_wide`, and e starts as normal(0, 0.5), not 0.02",
    "cx_shared": "`conditioned_exchanged`, the groups read through the tokens' network",
    "cx_spread": "`conditioned_exchanged`, e starts as normal(0, 0.5), not 0.02",
    "shortlist_clustered_counts": "the 2,048 most frequent tokens by themselves, the rest clustered",
}
LOSSES = {
    "validation_loss_nats": "loss (nats)",
    "validation_group_loss": "group loss",
    "validation_token_loss": "token loss",
}
add_options = add_settings


def measure(arguments: Namespace) -> None:
    """Gather the finished training runs into the table."""
    collect_runs("head_variants", arguments.settings)


def draw(corpus: str) -> None:
    """Write one corpus' table in words."""
    words = markdown(read_table("head_variants", corpus))
    path = RESULTS / corpus / "head_variants.md"
    write_text(path, words)
    print(words)


def markdown(table: pd.DataFrame) -> str:
    """A line a budget and variant, the best first; each variant minus the linear head over the seeds both have."""
    lines = [f"| tokens | head | what it is | {' | '.join(LOSSES.values())} | minus linear | seeds |", "|---" * 8 + "|"]
    for tokens, of_budget in table.groupby("tokens"):
        ranked = summarise(of_budget, ["head"], "validation_loss_nats").sort_values("mean")["head"]
        base = of_budget[of_budget["head"] == BASE].set_index("seed")["validation_loss_nats"]
        for head in ranked:
            rows = of_budget[of_budget["head"] == head]
            means = [rows[name].mean() for name in LOSSES]
            told = ["" if pd.isna(mean) else f"{mean:.4f}" for mean in means]
            minus = (rows.set_index("seed")["validation_loss_nats"] - base).mean()
            told += ["" if head == BASE or pd.isna(minus) else f"{minus:+.4f}", str(rows["seed"].nunique())]
            lines.append(
                f"| {float(str(tokens)) / 1e6:.2f} M | `{head}` | {VARIANTS.get(head, '')} | {' | '.join(told)} |"
            )
    first = table.iloc[0]
    rates_of = table.groupby("tokens")["learning_rate"].unique()
    rates = "; ".join(
        f"{', '.join(f'{rate:g}' for rate in found)} for {float(str(tokens)) / 1e6:.2f} M"
        for tokens, found in rates_of.items()
    )
    lines += [
        "",
        f"{first['model']}, hidden {first['hidden_size']}, {first['num_layers']} layers, {first['corpus']}; learning "
        f"rate {rates}. Losses on the last hundredth of the training "
        "documents, which no run has seen; the validation text decided nothing here. A mixture has no one group.",
        "",
    ]
    return "\n".join(lines)
