"""The image study of arXiv 2411.06371: Figures 1, 2, 6 and 7 and Table 4."""

from __future__ import annotations

import math

import pandas as pd

from experiments.claims.base import (
    Check,
    Claim,
    Finding,
    at_least,
    at_most,
    measured,
    reference,
    rows_where,
    with_columns,
)
from experiments.paper.shapes import PUBLISHED_LEARNING_RATE, ends_of, sets_of
from experiments.study.statistics import difference_over_seeds, summarise

FOLDER = "shapes"  # under results/; the largest set of classes there whose pictures were all seen is judged
CLASSES = 184_320
CHANCES = 2  # a head has learned nothing while its accuracy is at most so many times a guess's
NEAR_UNIFORM = 0.05  # and while its training loss is within this share of ln V
COMMAND = "`make pictures`"


def attributes(_: str) -> Finding:
    """Table 4 and Figure 1."""
    product = math.prod(len(options.split(";")) for options in reference("table4_attributes")["options"])
    examples = pictures()
    best = rows_where(examples, "figure1_shapes.csv", quantity="best accuracy")["value"].iloc[0]
    classes = int(examples["classes"].iloc[0])
    counted = Check(f"the options of Table 4 combine to {CLASSES:,} classes", f"{product:,}", product == CLASSES)
    found = f"of our {classes:,} classes, share of pictures that a perfect model can name: {{}}"
    return Finding((counted, at_least("no two classes look alike: best possible accuracy", best, 1.0, "{:.4f}", found)))


def pictures() -> pd.DataFrame:
    """The table of Figure 1, its largest set of classes."""
    command = "python -m experiments figure1_shapes measure"
    table = measured(FOLDER, "figure1_shapes", command, ("quantity", "value", "classes"))
    return table[table["classes"] == table["classes"].max()]


def ends() -> tuple[pd.DataFrame, int]:
    """(where each run at the published learning rate ends, number of classes)."""
    name = f"results/{FOLDER}/shapes_curves.csv"
    judged = sets_of(FOLDER)[0]
    columns = ("head", "learning_rate", "validation_accuracy", "validation_group_accuracy")
    rows = rows_where(ends_of(with_columns(judged.curves, name, columns)), name, learning_rate=PUBLISHED_LEARNING_RATE)
    for head in ("full", "paper"):
        rows_where(rows, name, head=head)
    return rows, judged.classes


def mean_of(rows: pd.DataFrame, head: str, column: str) -> float:
    """Over the seeds of one head."""
    return float(summarise(rows[rows["head"] == head], ["head"], column)["mean"].iloc[0])


def accuracy(_: str) -> Finding:
    """Figure 2."""
    rows, classes = ends()
    full = mean_of(rows, "full", "validation_accuracy")
    difference = difference_over_seeds(rows, "head", "paper", "full", "validation_accuracy")
    found = f"grouped minus full {difference.mean:+.4f} ± {difference.half_width:.4f} over {difference.count} seeds"
    return Finding((
        at_most("the full softmax stays at a guess", full, CHANCES / classes, "{:.4f}", f"full, of {classes:,}: {{}}"),
        Check("the grouped head is more accurate, by a 95% interval above 0", found, difference.low > 0),
    ))  # fmt: skip


def training_loss(_: str) -> Finding:
    """Figure 6."""
    rows, classes = ends()
    uniform = math.log(classes)
    full, grouped = (mean_of(rows, head, "train_loss") for head in ("full", "paper"))
    published = reference("image_study").set_index("head")["training_loss_nats"]
    share = float(published["grouped"] / published["full"])
    return Finding((
        at_least(f"full stays at ln V = {uniform:.2f}", full, (1 - NEAR_UNIFORM) * uniform, "{:.3f}", "full {}"),
        at_most("grouped falls to the published share of ln V", grouped / uniform, share, "{:.2f}",
                f"grouped {grouped:.3f} nats, of ln V {{}}"),
    ))  # fmt: skip


def group_accuracy(_: str) -> Finding:
    """Figure 7."""
    rows, classes = ends()
    value = mean_of(rows, "paper", "validation_group_accuracy")
    low = float(reference("image_study")["group_accuracy_low"].min())
    found = f"of {classes:,} classes: {{}}"
    return Finding((at_least("group accuracy in the published range or above", value, low, "{:.3f}", found),))


def published_end(column: str, form: str) -> str:
    """Where the published curves end."""
    table = reference("image_study").set_index("head")
    return ", ".join(f"{head} {form.format(table[column][head])}" for head in ("full", "grouped"))


def published_groups() -> str:
    """The published range."""
    row = reference("image_study").set_index("head").loc["grouped"]
    return f"{row['group_accuracy_low']} to {row['group_accuracy_high']}"


CLAIMS = (
    Claim(
        "Table 4, Figure 1",
        "Eight attributes make the classes of the image study, and pictures show them",
        lambda: f"{CLASSES:,} classes",
        attributes,
        ("shapes/figure1_shapes.png", "shapes/figure1_shapes.md", "paper/table4_attributes.csv"),
        "`python -m experiments figure1_shapes measure`",
    ),
    Claim(
        "Figure 2",
        "Validation accuracy: the full softmax never learns the classes, the grouped head does",
        lambda: published_end("validation_accuracy", "{:g}"),
        accuracy,
        ("shapes/shapes_figure2.png", "shapes/shapes.md", "shapes/shapes.csv"),
        COMMAND,
    ),
    Claim(
        "Figure 6",
        "Training loss: the full softmax stays at ln V, the grouped head falls to a third of it",
        lambda: published_end("training_loss_nats", "{:g} nats"),
        training_loss,
        ("shapes/shapes_figure6.png", "shapes/shapes.md", "shapes/shapes.csv"),
        COMMAND,
    ),
    Claim(
        "Figure 7",
        "The grouped head nearly always finds the group of a picture",
        published_groups,
        group_accuracy,
        ("shapes/shapes_figure7.png", "shapes/shapes.md", "shapes/shapes.csv"),
        COMMAND,
    ),
)
