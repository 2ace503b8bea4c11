"""Figure 1 of arXiv 2411.06371: examples of the image study's pictures, and which classes look alike.

    python -m experiments figure1_shapes measure [KEY=VALUE ...]
    python -m experiments figure1_shapes draw [CORPUS ...]

draws every geometry of the classes of experiment=shapes once to see which no model can tell apart, and writes the
accuracies that this leaves into results/CORPUS/figure1_shapes.csv; the picture shows examples. KEY=VALUE: settings of
training that choose other classes.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments.paper.lookalikes import Lookalikes, find_lookalikes
from experiments.study.figures import COLUMN_INCHES, read_measured, save
from experiments.study.measuring import add_settings, composed, identity, is_measured, text_of, write_measured
from vocabfold.data.drawing import ATTRIBUTES, picture
from vocabfold.data.shapes import Shapes, load_shapes
from vocabfold.files import write_text
from vocabfold.heads.partition import equal_partition
from vocabfold.machine import origin
from vocabfold.runs.settings import Settings
from vocabfold.runs.tables import RESULTS

ROWS, COLUMNS = 4, 8


def settings_of(words: Sequence[str]) -> Settings:
    """The settings of experiment=shapes."""
    return composed(["experiment=shapes", *words])


def draw_examples(shapes: Shapes, path: Path) -> None:
    """A sheet of validation pictures, every one labelled with its class."""
    numbers = shapes.num_train + np.random.default_rng(0).choice(shapes.num_valid, ROWS * COLUMNS, replace=False)
    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(2 * COLUMN_INCHES, COLUMN_INCHES * 1.25))
    for axis, number in zip(axes.flat, numbers.tolist(), strict=True):
        axis.imshow(picture(shapes.classes, shapes.seed, number, shapes.image_size), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{number % len(shapes.classes):,}", fontsize=6, pad=2)
        axis.spines[:].set(visible=True, linewidth=0.3)
    save(figure, path)


def table_of(shapes: Shapes, found: Lookalikes) -> pd.DataFrame:
    """Ceilings over all classes, and the share of distinguishable classes for every option of every attribute."""
    partition = equal_partition(len(shapes.classes), None)
    rows: list[dict[str, object]] = [
        {"quantity": "best accuracy", "value": found.best_accuracy()},
        {"quantity": "best group accuracy", "value": found.best_accuracy(partition.group_of.numpy())},
    ]
    for attribute in ATTRIBUTES:
        for option, value in found.by_option(attribute).items():
            rows.append({"quantity": "looks like no other", "attribute": attribute, "option": option, "value": value})
    table = pd.DataFrame(rows)[["quantity", "attribute", "option", "value"]]
    return table.assign(
        classes=len(shapes.classes),
        num_groups=partition.num_groups,
        image_size=shapes.image_size,
        **origin(),
    )


def markdown(table: pd.DataFrame) -> str:
    """The table in words."""
    first = table.iloc[0]
    lines = [
        f"{first['classes']:,} classes, pictures of {first['image_size']} x {first['image_size']}, "
        f"{first['num_groups']} groups of consecutive classes.",
        "",
        "| at best | share of pictures |",
        "|---|---|",
    ]
    shares = table["attribute"].notna()
    lines += [f"| {row['quantity'][5:]} | {row['value']:.4f} |" for _, row in table[~shares].iterrows()]
    lines += ["", "| attribute | share of its classes that look like no other class, by option |", "|---|---|"]
    for attribute, rows in table[shares].groupby("attribute", sort=False):
        cells = ", ".join(f"{row['option']} {row['value']:.3f}" for _, row in rows.iterrows())
        lines.append(f"| {attribute} | {cells} |")
    return "\n".join([*lines, ""])


add_options = add_settings


def measure(arguments: Namespace) -> None:
    """Find the classes that look alike and write the table."""
    settings = settings_of(arguments.settings)
    path = RESULTS / settings.corpus / "figure1_shapes.csv"
    measurement = identity("figure1_shapes", arguments, text_of(settings))
    if is_measured(path, measurement):
        return
    shapes = load_shapes(settings.data)
    table = table_of(shapes, find_lookalikes(shapes.classes, shapes.image_size))
    write_measured(table.assign(data=json.dumps(settings.data)), path, measurement, beside="classes")


def draw(corpus: str) -> None:
    """Write examples and the table in words of each set of classes; the largest set's have the plain names."""
    path = RESULTS / corpus / "figure1_shapes.csv"
    table = read_measured(path, ("quantity", "data"))
    parts = [rows for _, rows in sorted(table.groupby("classes"), reverse=True, key=lambda part: int(str(part[0])))]
    for place, rows in enumerate(parts):
        suffix = f"_{rows['classes'].iloc[0]}" if place else ""
        draw_examples(load_shapes(json.loads(rows["data"].iloc[0])), path.with_name(f"figure1_shapes{suffix}.png"))
    write_text(path.with_suffix(".md"), "\n".join(markdown(rows) for rows in parts))
    print(f"wrote {path.with_suffix('.md')}")
