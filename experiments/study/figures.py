"""How every figure looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from vocabfold.command_line import one_line_errors
from vocabfold.errors import UserError
from vocabfold.files import replacing, write_text
from vocabfold.runs.record import RESULTS

# Okabe and Ito's palette: told apart by colour-blind readers too. Every series also has a marker or dash of its own.
COLORS = {"blue": "#0072B2", "orange": "#E69F00", "green": "#009E73", "red": "#D55E00", "purple": "#CC79A7"}
GREY = "#666666"
COLUMN_INCHES = 3.4  # one column of a two-column page
STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "figure.dpi": 200,
    "figure.constrained_layout.use": True,
}


def seeds_of(table: pd.DataFrame) -> str:
    """How many seeds each contender has, in words: a range where they differ."""
    counts = table.groupby("contender")["seed"].nunique()
    return f"{counts.max()} seeds" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()} seeds"


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a whole or not at all. No date goes in, so the same table gives the same file."""
    with replacing(path) as beside:
        figure.savefig(beside, format="png", metadata={"Software": None})
    plt.close(figure)
    print(f"wrote {path}")


def report(
    path: Path,
    markdown: Callable[[pd.DataFrame], str],
    draw: Callable[[pd.DataFrame, Path], None],
    columns: Sequence[str] = (),
) -> None:
    """A table that a program measured, in words (.md, and on stdout) and as a figure (.png) beside it.

    Raises UserError where there is no table or it lacks one of the ``columns``.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: measure it first, with the same program and no option to draw alone")
    table = pd.read_csv(path, keep_default_na=False, na_values=[""])
    if missing := [name for name in columns if name not in table.columns]:
        raise UserError(f"{path} has no column {missing[0]}: another version wrote it; measure again")
    words = markdown(table)
    write_text(path.with_suffix(".md"), words)
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        draw(table, path.with_suffix(".png"))
    print(words)


def draw_for_scales(experiment: str, draw: Callable[[str], None]) -> Callable[[], None]:
    """A program that draws ``experiment`` for the scales named on its command line, or for all that have its table."""

    @one_line_errors
    def program() -> None:
        scales = sys.argv[1:] or sorted(path.parent.name for path in RESULTS.glob(f"*/{experiment}.csv"))
        if not scales:
            raise UserError(f"there is no results/*/{experiment}.csv to draw: run `make everything` first")
        with plt.rc_context(STYLE):  # type: ignore[arg-type]
            for scale in scales:
                draw(scale)

    return program
