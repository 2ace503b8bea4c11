"""Figure 1 of arXiv 2411.06371: examples of the image study's pictures, and which classes look alike.

    python -m experiments figure1_shapes [SCALE ...]

draws pictures of experiment=shapes at each scale (all scales by default) into results/SCALE/figure1_shapes.png, then
every geometry once to see which classes no model can tell apart, and writes the accuracies that this leaves into
results/SCALE/figure1_shapes.csv and .md.
"""

from __future__ import annotations

import sys
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.paper.lookalikes import Lookalikes, find_lookalikes
from experiments.study.figures import COLUMN_INCHES, STYLE, save
from vocabfold.command_line import one_line_errors
from vocabfold.data.drawing import ATTRIBUTES, picture
from vocabfold.data.shapes import Shapes, load_shapes
from vocabfold.files import write_text
from vocabfold.heads.partition import equal_partition
from vocabfold.machine import code_commit
from vocabfold.runs.record import RESULTS
from vocabfold.runs.settings import CONFIG_FOLDER

SCALES = ("laptop", "text", "paper")
ROWS, COLUMNS = 4, 8


def shapes_at(scale: str) -> Shapes:
    """The image set of experiment=shapes."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config = compose("train", ["experiment=shapes", f"scale={scale}"])
    data: Any = OmegaConf.to_container(config.data, resolve=True)
    return load_shapes(data)


def draw_examples(shapes: Shapes, scale: str) -> None:
    """A sheet of validation pictures, every one labelled with its class."""
    numbers = shapes.num_train + np.random.default_rng(0).choice(shapes.num_valid, ROWS * COLUMNS, replace=False)
    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(2 * COLUMN_INCHES, COLUMN_INCHES * 1.25))
    for axis, number in zip(axes.flat, numbers.tolist(), strict=True):
        axis.imshow(picture(shapes.classes, shapes.seed, number, shapes.image_size), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{number % len(shapes.classes):,}", fontsize=6, pad=2)
        axis.spines[:].set(visible=True, linewidth=0.3)
    save(figure, RESULTS / scale / "figure1_shapes.png")


def table_of(shapes: Shapes, found: Lookalikes, scale: str) -> pd.DataFrame:
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
        scale=scale,
        classes=len(shapes.classes),
        num_groups=partition.num_groups,
        image_size=shapes.image_size,
        commit=code_commit(),
        command=f"python -m experiments figure1_shapes {scale}",
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


@one_line_errors
def main() -> None:
    """Command line: scales."""
    for scale in sys.argv[1:] or SCALES:
        shapes = shapes_at(scale)
        with plt.rc_context(STYLE):  # type: ignore[arg-type]
            draw_examples(shapes, scale)
        table = table_of(shapes, find_lookalikes(shapes.classes, shapes.image_size), scale)
        path = RESULTS / scale / "figure1_shapes.csv"
        write_text(path, table.to_csv(index=False))
        write_text(path.with_suffix(".md"), markdown(table))
        print(f"{markdown(table)}\nwrote {path}")


if __name__ == "__main__":
    main()
