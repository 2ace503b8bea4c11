"""GPT-2 and GPT-Neo with the full softmax against the paper's head: loss, speed and memory, and "on par".

    python -m vocabfold.train --multirun experiment=main_comparison
    python -m experiments document_losses measure
    python -m experiments main_comparison measure
    python -m experiments main_comparison draw [CORPUS ...]

results/CORPUS/main_comparison.csv, and document_losses.csv where those runs were evaluated document by document ->
results/CORPUS/main_comparison.png and .md. "On par" is a tested statement: the difference lies within MARGIN_NATS. At
equal time it comes from the curves of heads_pareto and the speeds of heads_cost, one interleaved run.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from experiments.heads.heads_pareto import heads_of, timed_curves
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, save, trained_on
from experiments.study.measuring import add_settings, collect_runs
from experiments.study.statistics import (
    Difference,
    Equivalence,
    Interval,
    equivalence,
    paired_bootstrap,
    paired_difference,
    summarise,
)
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.runs.tables import RESULTS, read_rows, read_table

MODELS = {"gpt2": "GPT-2", "gpt_neo": "GPT-Neo"}
LABELS = {"full": "full softmax", "paper": "the paper's head"}
HEADS = {"full": (COLORS["orange"], "s"), "paper": (COLORS["blue"], "o")}
QUANTITIES = {
    "validation_loss_nats": ("Validation loss (nats per token)", "{:.3f}"),
    "perplexity": ("Perplexity", "{:.2f}"),
    "tokens_per_second": ("Training tokens per second", "{:,.0f}"),
    "peak_memory_gib": ("Peak training memory (GiB)", "{:.3f}"),
    "flops_per_token": ("FLOPs per training token", "{:,.0f}"),
    "num_parameters": ("Parameters", "{:,.0f}"),
}
DRAWN = ("validation_loss_nats", "tokens_per_second", "peak_memory_gib")
KEY = ["corpus", "hidden_size", "model", "head"]
# A tenth of the 0.52 nats (3.43 to 3.95) by which the published losses of the paper's own group sizes differ, and a
# twentieth of perplexity: a reader who calls two models "on par" means no more. It comes from published numbers alone.
MARGIN_NATS = 0.05
VERDICTS = {
    "equivalent": "**on par**",
    "greater": "**not on par: worse by more than the margin**",
    "less": "**not on par: better by more than the margin**",
    "undecided": "**undecided**: these seeds show neither",
}
EQUAL_TIME = ("full", "scale_shift_bpe")  # of heads_pareto: GPT-2's own head and the paper's


add_options = add_settings


def measure(arguments: Namespace) -> None:
    """Gather the finished training runs into the table."""
    collect_runs("main_comparison", arguments.settings)


def draw(corpus: str) -> None:
    """Write one corpus' picture and table."""
    table = read_table("main_comparison", corpus)
    documents = read_documents(corpus, table)
    compared = comparisons(table, documents)
    figure = plt.figure(figsize=(2 * COLUMN_INCHES, 2.1 + 0.7 + 0.2 * len(compared)))
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.1, 0.7 + 0.2 * len(compared)])[:, 0]
    axes = upper.subplots(1, len(DRAWN), sharey=True)
    for axis, quantity in zip(axes, DRAWN, strict=True):
        rows = summarise(table, KEY, quantity).sort_values(
            KEY, ascending=[False, False, False, True], ignore_index=True
        )
        for position, row in rows.iterrows():
            color, marker = HEADS[row["head"]]
            axis.errorbar(row["mean"], position, xerr=row["half_width"], color=color, marker=marker, capsize=3)
        axis.set_yticks(range(len(rows)), [name_of(row, table) for _, row in rows.iterrows()])
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.set_xlabel(QUANTITIES[quantity][0])
        if quantity != "validation_loss_nats":
            axis.set_xlim(left=0)
    draw_differences(lower.subplots(), compared)
    seeds = table["seed"].nunique()
    figure.suptitle(f"{trained_on(table)}; {seeds} seeds, 95% intervals; {len(table)} runs", fontsize=7)
    save(figure, RESULTS / corpus / "main_comparison.png")
    path = RESULTS / corpus / "main_comparison.md"
    write_text(path, markdown(table, compared, equal_time(corpus)))
    print(f"wrote {path}")


def name_of(row: pd.Series, table: pd.DataFrame) -> str:
    """The label of one model and head."""
    return f"{model_name(row, table)}, {LABELS[row['head']]}"


def model_name(row: pd.Series, table: pd.DataFrame) -> str:
    """The label of its model; hidden size and corpus are named only where they vary."""
    size = f", {row['hidden_size']}" if table["hidden_size"].nunique() > 1 else ""
    return f"{MODELS[row['model']]}{size}" + (f", {row['corpus']}" if table["corpus"].nunique() > 1 else "")


def markdown(table: pd.DataFrame, compared: list[Comparison], at_equal_time: list[str]) -> str:
    """Means and 95% intervals over seeds, one line a model and head, then what is compared."""
    means = summarise(table, KEY, "validation_loss_nats")
    titles = [title for title, _ in QUANTITIES.values()]
    lines = ["| model, head | " + " | ".join(titles) + " | seeds |", "|---" * (len(titles) + 2) + "|"]
    for _, one in means.iterrows():
        rows = table[(table[KEY] == one[KEY].to_numpy()).all(axis=1)]
        cells = []
        for quantity, (_, form) in QUANTITIES.items():
            summary = summarise(rows, KEY, quantity).iloc[0]
            varies = rows[quantity].nunique() > 1
            cells.append(form.format(summary["mean"]) + (f" ± {form.format(summary['half_width'])}" if varies else ""))
        lines.append(f"| {name_of(one, table)} | " + " | ".join(cells) + f" | {one['seeds']} |")
    first = table.iloc[0]
    notes = (
        f"{trained_on(table)}; mean ± 95% interval (Student's "
        f"t) over seeds. On par: two one-sided paired t-tests over seeds, margin {MARGIN_NATS} nats (5% of "
        "perplexity), at the 5% level. The interval over documents is of these very models on other documents of the "
        "kind (bootstrap), the one over seeds of other initialisations on these documents."
    )
    hardware = f"Hardware: {first['hardware']}; torch {first['torch']}."
    told = ["At equal tokens:", "", *(line for one in compared for line in one.lines()), "", *at_equal_time]
    return "\n".join([*lines, "", *told, "", notes, hardware, ""])


@dataclass(frozen=True)
class Comparison:
    """The paper's head minus full of one model, in nats a token: over seeds, over documents where they were measured
    (the mean of the seeds' models), and whether that is on par."""

    name: str
    seeds: Difference
    documents: Interval | None
    num_documents: int
    on_par: Equivalence

    def lines(self) -> list[str]:
        """In words."""
        over_seeds = f"{self.seeds.mean:+.3f} ± {self.seeds.half_width:.3f} nats"
        told = f"* {self.name}: the paper's head minus full {over_seeds} over {self.seeds.count} seeds (paired t-test, "
        told += f"p = {self.seeds.p_value:.2g}); "
        if self.documents is None:
            told += "by document not measured (python -m experiments document_losses measure)"
        else:
            low, high = self.documents.low, self.documents.high
            told += f"{low:+.3f} to {high:+.3f} over {self.num_documents:,} documents (bootstrap)"
        return [told, f"  * {verdict(self.on_par)}"]


def verdict(tested: Equivalence) -> str:
    """An equivalence test in words."""
    interval = f"90% interval {tested.low:+.3f} to {tested.high:+.3f}"
    return f"{VERDICTS[tested.verdict]} (margin {tested.margin} nats; TOST p = {tested.p_value:.2g}; {interval})"


def read_documents(corpus: str, table: pd.DataFrame) -> pd.DataFrame | None:
    """The losses by document, None where they were not measured. Raises UserError where they are of other runs than
    ``table``."""
    path = RESULTS / corpus / "document_losses.csv"
    if not path.is_file():
        return None
    documents = read_rows(path)
    run = [*KEY, "seed"]
    if missing := [name for name in (*run, "document", "tokens", "loss_nats") if name not in documents.columns]:
        raise UserError(f"{path} has no column {missing[0]}: another version wrote it; measure again")
    sums = documents.groupby(run)[["loss_nats", "tokens"]].sum()
    reported = table.set_index(run)["validation_loss_nats"]
    both = sums.join(reported, how="inner")
    if both.empty or (both["loss_nats"] / both["tokens"] - both["validation_loss_nats"]).abs().max() > 2e-4:
        raise UserError(f"{path} is of other runs: run `python -m experiments document_losses measure` again")
    return documents


def comparisons(table: pd.DataFrame, documents: pd.DataFrame | None) -> list[Comparison]:
    """Every model that was trained with both heads on the same seeds."""
    found = []
    for _, rows in table.groupby(KEY[:-1]):
        loss = rows.pivot(index="seed", columns="head", values="validation_loss_nats")
        if not {"full", "paper"} <= set(loss.columns) or len(loss := loss.dropna()) < 2:
            continue
        paper, full = loss["paper"].tolist(), loss["full"].tolist()
        over_documents, count = by_document(documents, rows.iloc[0], loss.index.tolist())
        found.append(
            Comparison(
                model_name(rows.iloc[0], table),
                paired_difference(paper, full),
                over_documents,
                count,
                equivalence(paper, full, MARGIN_NATS),
            )
        )
    return found


def by_document(documents: pd.DataFrame | None, model: pd.Series, seeds: list[int]) -> tuple[Interval | None, int]:
    """(the paper's head minus full over documents, each the mean of the ``seeds``, how many documents); None where a
    seed is missing."""
    if documents is None:
        return None, 0
    same = documents["seed"].isin(seeds)
    for name in KEY[:-1]:
        same &= documents[name] == model[name]
    means = documents[same].pivot_table(index="document", columns="head", values=["loss_nats", "tokens"])
    measured = documents[same].groupby("head")["seed"].nunique()
    if any(measured.get(head, 0) < len(seeds) for head in HEADS):
        return None, 0
    loss, tokens = means["loss_nats"], means["tokens"]["full"].to_numpy()
    return paired_bootstrap(loss["paper"].to_numpy(), loss["full"].to_numpy(), tokens), len(means)


def draw_differences(axis: Axes, compared: list[Comparison]) -> None:
    """The paper's head minus full, with both intervals, and the margin within which models are on par."""
    axis.axvspan(-MARGIN_NATS, MARGIN_NATS, color=GREY, alpha=0.2, linewidth=0, label=f"on par: ±{MARGIN_NATS}")
    axis.axvline(0, color=GREY, linewidth=0.8)
    over_seeds: dict[str, Any] = {"color": COLORS["blue"], "marker": "o", "label": "95% over seeds"}
    over_documents: dict[str, Any] = {"color": COLORS["purple"], "marker": "D", "label": "95% over documents"}
    for place, one in enumerate(reversed(compared)):
        axis.errorbar(one.seeds.mean, place + 0.15, xerr=one.seeds.half_width, capsize=3, linestyle="", **over_seeds)
        over_seeds["label"] = None  # once in the legend
        if one.documents is not None:
            mean, low, high = one.documents.mean, one.documents.low, one.documents.high
            ends = [[mean - low], [high - mean]]
            axis.errorbar(mean, place - 0.15, xerr=ends, capsize=3, linestyle="", **over_documents)
            over_documents["label"] = None
    axis.set_yticks(range(len(compared)), [one.name for one in reversed(compared)])
    axis.set_ylim(-0.6, len(compared) - 0.4)
    axis.set_xlabel("Validation loss, the paper's head minus full (nats per token)")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def equal_time(corpus: str) -> list[str]:
    """The paper's head after its whole budget against GPT-2's own at the first evaluation after as many seconds, which
    is the more in favour of the full softmax the later it comes; its learning rate had not yet fallen then."""
    if not all((RESULTS / corpus / name).is_file() for name in ("heads_pareto.csv", "heads_pareto_curves.csv")):
        return ["At equal time: not measured on this text (make heads)."]
    heads = heads_of(read_table("heads_pareto", corpus), corpus)
    curves = timed_curves(corpus, heads)
    full, paper = (curves[curves["head"] == name] for name in EQUAL_TIME)
    if full.empty or paper.empty:
        return ["At equal time: not measured on this text (make heads)."]
    seconds = float(paper["seconds"].max())
    last = paper[paper["seconds"] == seconds].set_index("seed")["validation_loss_nats"]
    later = full[full["seconds"] >= seconds]
    at = float(later["seconds"].min())
    there = later[later["seconds"] == at].set_index("seed")["validation_loss_nats"]
    loss = pd.concat({"paper": last, "full": there}, axis=1).dropna()
    if len(loss) < 2:
        return ["At equal time: the evaluations of heads_pareto hold fewer than two seeds of both."]
    difference = paired_difference(loss["paper"].tolist(), loss["full"].tolist())
    tested = equivalence(loss["paper"].tolist(), loss["full"].tolist(), MARGIN_NATS)
    return [
        "At equal time (heads_pareto, each head at its own learning rate; seconds are steps at the speed of one "
        "interleaved run):",
        "",
        f"* GPT-2: the paper's head after its whole budget ({seconds:.0f} s) minus full at its first evaluation after "
        f"that ({at:.0f} s, {at / seconds:.1f} times as long, in mid-schedule: one cut to that time would do better): "
        f"{difference.mean:+.3f} ± {difference.half_width:.3f} nats over {difference.count} seeds (paired t-test, "
        f"p = {difference.p_value:.2g})",
        f"  * {verdict(tested)}",
    ]
