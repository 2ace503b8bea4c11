"""Figures 2, 6 and 7 of arXiv 2411.06371, the image study: accuracy, training loss and group accuracy over training.

    python -m vocabfold.train --multirun experiment=shapes
    python -m vocabfold.train --multirun experiment=shapes_full
    python -m experiments shapes measure
    python -m experiments shapes draw [CORPUS ...]

results/CORPUS/shapes_curves.csv and shapes_full_curves.csv (all 184,320 classes) -> shapes_figure2.png (accuracy, and
by learning rate), shapes_figure6.png (training loss), shapes_figure7.png (group accuracy, with the published range) and
shapes.md beside them. What pictures that look alike leave to be reached is in figure1_shapes.csv.

The plain names are those of the largest set of classes whose training pictures were all seen. Those of another set end
in its number of classes; one whose runs were evaluated at their end alone has a picture of the training loss only.
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from experiments.study.curves import draw_curve, read_curves, runs_of
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, save
from experiments.study.measuring import add_settings, collect_runs
from experiments.study.statistics import difference_over_seeds, mean_and_interval, summarise
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.runs.tables import RESULTS, read_rows, read_table

TABLES = ("shapes_curves", "shapes_full_curves")
EXPERIMENTS = ("shapes", "shapes_full")
PUBLISHED_LEARNING_RATE = 1e-3
FULL, PAPER = "full", "paper"
HEADS = {FULL: ("full softmax", COLORS["orange"], "s"), PAPER: ("the paper's head", COLORS["blue"], "o")}
STYLES = ("--", "-", ":")
QUANTITIES = {
    "validation_accuracy": ("validation accuracy", "{:.4f}"),
    "validation_group_accuracy": ("validation group accuracy", "{:.4f}"),
    "validation_loss_nats": ("validation loss (nats)", "{:.3f}"),
    "train_loss": ("training loss (nats)", "{:.3f}"),
    "tokens_per_second": ("pictures/s", "{:,.0f}"),
    "peak_memory_gib": ("peak memory (GiB)", "{:.2f}"),
}
MEASURED = ("tokens_per_second", "peak_memory_gib")  # of the whole run

add_options = add_settings


def measure(arguments: Namespace) -> None:
    """Gather the finished training runs into their tables and curves."""
    if not (found := [name for name in EXPERIMENTS if any((RESULTS / "runs").glob(f"*/{name}/*/row.json"))]):
        raise UserError(f"no run of {' or '.join(EXPERIMENTS)} has finished: train one of them first")
    for name in found:
        collect_runs(name, arguments.settings, with_curves=True)


@dataclass(frozen=True)
class PictureSet:
    """The curves of the runs on a set of classes, and which share of its training pictures (at most 1) each of them
    saw."""

    classes: int
    curves: pd.DataFrame
    seen: float

    @property
    def title(self) -> str:
        """What was trained, in words."""
        part = "" if self.seen == 1 else f", of whose training pictures {self.seen:.0%} were seen"
        return f"{self.classes:,} classes of pictures{part}; {runs_of(self.curves)}"


def draw(corpus: str) -> None:
    """Write the pictures and a table of each set of classes; the first set's pictures have the plain names."""
    sections = []
    for place, one in enumerate(sets_of(corpus)):
        ceilings, ends = ceilings_of(corpus, one.classes), ends_of(one.curves)

        def path_of(figure: int, suffix: str = f"_{one.classes}" if place else "") -> Path:
            return RESULTS / corpus / f"shapes_figure{figure}{suffix}.png"

        draw_loss(one.curves, one.classes, one.title, path_of(6))
        if one.curves.dropna(subset=["validation_accuracy"])["step"].nunique() > 1:
            draw_accuracy(one.curves, ceilings, one.title, path_of(2))
            draw_group_accuracy(one.curves[one.curves["head"] == PAPER], ceilings, one.title, path_of(7))
        sections.append(f"{one.title}:\n\n{markdown(ends, ceilings)}")
    path = RESULTS / corpus / "shapes.md"
    write_text(path, "\n".join(sections))
    print(f"wrote {path}")


def sets_of(corpus: str) -> list[PictureSet]:
    """Each set of classes: those whose training pictures were all seen, the largest first, then the others."""
    there = [name for name in EXPERIMENTS if (RESULTS / corpus / f"{name}_curves.csv").is_file()] or EXPERIMENTS[:1]
    table = pd.concat([read_table(name, corpus) for name in there]).set_index("run")
    curves = pd.concat([read_curves(name, corpus) for name in there], ignore_index=True)
    curves = curves.assign(**{name: curves["run"].map(table[name]) for name in MEASURED})
    classes = curves["run"].map(table["vocabulary_size"]).astype(int)
    # A picture is a document, and is counted as a token.
    seen = (table["tokens"] / table["corpus_documents"]).clip(upper=1).groupby(table["vocabulary_size"]).min()
    sets = [PictureSet(int(number), curves[classes == number], float(seen[number])) for number in classes.unique()]
    return sorted(sets, key=lambda one: (one.seen < 1, -one.classes))


def ceilings_of(corpus: str, classes: int) -> dict[str, float]:
    """The best accuracy and group accuracy that pictures which look alike leave. Raises UserError where figure1_shapes
    has not measured them."""
    path = RESULTS / corpus / "figure1_shapes.csv"
    rows = read_rows(path).query("classes == @classes") if path.is_file() else pd.DataFrame()
    if rows.empty:
        raise UserError(f"{path} has no {classes} classes: run `python -m experiments figure1_shapes measure` first")
    best = rows[rows["quantity"].str.startswith("best ")].set_index("quantity")["value"]
    return {str(quantity).removeprefix("best "): float(value) for quantity, value in best.items()}


def draw_accuracy(curves: pd.DataFrame, ceilings: dict[str, float], title: str, path: Path) -> None:
    """Figure 2: accuracy against steps at the published learning rate, and where it ends at each."""
    ends = ends_of(curves)
    figure, axes = plt.subplots(1, 2, figsize=(2 * COLUMN_INCHES, 2.3), sharey=True)
    published = curves[curves["learning_rate"] == PUBLISHED_LEARNING_RATE]
    for head, (label, color, marker) in HEADS.items():
        draw_curve(axes[0], published[published["head"] == head], "validation_accuracy", color, label)
        rows = summarise(ends[ends["head"] == head], ["learning_rate"], "validation_accuracy")
        line: dict[str, Any] = {"color": color, "marker": marker, "capsize": 3, "label": label}
        axes[1].errorbar(rows["learning_rate"], rows["mean"], yerr=rows["half_width"], **line)
    axes[0].set(xlabel=f"Optimizer step (learning rate {PUBLISHED_LEARNING_RATE:g})", ylabel="Validation accuracy")
    axes[1].set(xlabel="Learning rate", xscale="log")
    rates = sorted(ends["learning_rate"].unique())
    axes[1].set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes[1].minorticks_off()
    for axis in axes:
        axis.axhline(ceilings["accuracy"], color=GREY, linewidth=0.8, linestyle="--", label="best possible")
    axes[0].set_ylim(0, 1)
    axes[0].legend(loc="best")
    figure.suptitle(title, fontsize=7)
    save(figure, path)


def draw_loss(curves: pd.DataFrame, classes: int, title: str, path: Path) -> None:
    """Figure 6: training loss against steps at every learning rate."""
    figure, axes = plt.subplots(1, 2, figsize=(2 * COLUMN_INCHES, 2.3), sharey=True)
    for axis, (head, (label, color, _)) in zip(axes, HEADS.items(), strict=True):
        rows = curves[curves["head"] == head]
        for style, (learning_rate, runs) in zip(STYLES, rows.groupby("learning_rate"), strict=False):
            draw_curve(axis, runs, "train_loss", color, f"{learning_rate:g}", style)
        axis.axhline(math.log(classes), color=GREY, linewidth=0.8, linestyle=(0, (1, 2)), label=f"ln {classes:,}")
        axis.set_title(label, fontsize=8)
        axis.set_xlabel("Optimizer step")
        axis.legend(title="learning rate", title_fontsize=7)
    axes[0].set_ylabel("Training loss (nats)")
    axes[0].set_ylim(bottom=0)
    figure.suptitle(title, fontsize=7)
    save(figure, path)


def draw_group_accuracy(curves: pd.DataFrame, ceilings: dict[str, float], title: str, path: Path) -> None:
    """Figure 7: group accuracy of the paper's head against steps, with the published range."""
    figure, axis = plt.subplots(figsize=(COLUMN_INCHES, 3.0))
    for style, (learning_rate, rows) in zip(STYLES, curves.groupby("learning_rate"), strict=False):
        label = f"learning rate {learning_rate:g}"
        draw_curve(axis, rows, "validation_group_accuracy", COLORS["blue"], label, style)
    published = pd.read_csv(RESULTS / "paper" / "image_study.csv").dropna(subset=["group_accuracy_low"])
    low, high = published["group_accuracy_low"].min(), published["group_accuracy_high"].max()
    axis.axhspan(low, high, color=COLORS["green"], alpha=0.3, linewidth=0, label="published, 184,320 classes")
    best = ceilings["group accuracy"]
    axis.axhline(best, color=GREY, linewidth=0.8, linestyle="--", label="best possible")
    axis.set(xlabel="Optimizer step", ylabel="Validation group accuracy", ylim=(0, 1.02))
    figure.legend(loc="outside lower center", ncols=2)
    figure.suptitle(title.replace("; ", "\n"), fontsize=7)
    save(figure, path)


def ends_of(curves: pd.DataFrame) -> pd.DataFrame:
    """Where each run's curve ends."""
    return curves.sort_values("step").groupby(["head", "learning_rate", "seed"], as_index=False).last()


def markdown(ends: pd.DataFrame, ceilings: dict[str, float]) -> str:
    """Where each head ends at each learning rate: means and 95% intervals over seeds."""
    lines = [
        "| head, learning rate | " + " | ".join(title for title, _ in QUANTITIES.values()) + " | seeds |",
        "|---" * (len(QUANTITIES) + 2) + "|",
    ]
    for (head, learning_rate), rows in ends.groupby(["head", "learning_rate"]):
        cells = []
        for column, (_, form) in QUANTITIES.items():
            mean, half_width = mean_and_interval(rows[column].dropna().tolist() or [float("nan")])
            interval = "" if pd.isna(half_width) else f" ± {form.format(half_width)}"
            cells.append("" if pd.isna(mean) else form.format(mean) + interval)
        lines.append(f"| {HEADS[str(head)][0]}, {learning_rate:g} | " + " | ".join(cells) + f" | {len(rows)} |")
    notes = [
        f"At step {ends['step'].max():,}; mean ± 95% interval (Student's t) over seeds. Pictures/s of runs that were "
        "trained one by one, not interleaved: no ratio is meant.",
        *difference(ends),
    ]
    return "\n".join([*lines, "", *notes, f"Best possible accuracy: {ceilings['accuracy']:.4f}.", ""])


def difference(ends: pd.DataFrame) -> list[str]:
    """The paper's head minus the full softmax in accuracy at each learning rate, seed by seed."""
    lines = []
    for learning_rate, rows in ends.groupby("learning_rate"):
        found = difference_over_seeds(rows, "head", PAPER, FULL, "validation_accuracy")
        if found.count > 1:
            lines.append(
                f"Learning rate {learning_rate:g}: the paper's head minus the full softmax {found.mean:+.4f} ± "
                f"{found.half_width:.4f} in accuracy (paired t-test over {found.count} seeds, p = {found.p_value:.2g})."
            )
    return lines
