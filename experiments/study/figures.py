"""How every figure looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from vocabfold.errors import UserError
from vocabfold.files import replacing, write_text
from vocabfold.runs.tables import RESULTS, read_rows

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
    """How many seeds each head has, in words: a range where they differ."""
    counts = table.groupby("head")["seed"].nunique()
    most = "1 seed" if counts.max() == 1 else f"{counts.max()} seeds"
    return most if counts.min() == counts.max() else f"{counts.min()} to {most}"


def of_largest_budget(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the runs that trained on the most tokens of each text: those of two budgets are no curve."""
    return table[table["tokens"] == table.groupby("corpus")["tokens"].transform("max")]


def trained_on(table: pd.DataFrame) -> str:
    """Text, size of the model and budget of the runs in a table, in words: what every caption begins with."""
    first = table.iloc[0]
    sizes = " and ".join(f"{size:,.0f}" for size in sorted(table["hidden_size"].dropna().unique()))
    budget = f"{first['tokens'] / 1e6:.2f} M tokens"
    corpora = " and ".join(table["corpus"].unique())
    return f"{corpora}; hidden {sizes}, {first['num_layers']:.0f} layers; {budget}"


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a whole or not at all. No date goes in, so the same table gives the same file."""
    with replacing(path) as beside:
        figure.savefig(beside, format="png", metadata={"Software": None})
    plt.close(figure)
    print(f"wrote {path}")


def read_measured(path: Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """A measured table; words such as "none" are values. Raises UserError where there is none or it lacks one of the
    ``columns``."""
    if not path.is_file():
        raise UserError(f"{path} is missing: run `python -m experiments {path.stem} measure` first")
    table = read_rows(path)
    if missing := [name for name in columns if name not in table.columns]:
        raise UserError(f"{path} has no column {missing[0]}: another version wrote it; measure again")
    return table


def report(
    path: Path,
    markdown: Callable[[pd.DataFrame], str],
    draw: Callable[[pd.DataFrame, Path], None],
    columns: Sequence[str] = (),
) -> None:
    """A measured table in words (.md, and on stdout) and as a figure (.png) beside it.

    Raises UserError where there is no table or it lacks one of the ``columns``.
    """
    table = read_measured(path, columns)
    words = markdown(table)
    write_text(path.with_suffix(".md"), words)
    draw(table, path.with_suffix(".png"))
    print(words)


def corpora_with(*tables: str) -> list[str]:
    """The folders of results/ that hold one of the ``tables``, but for the published values."""
    paths = [path for table in tables for path in RESULTS.glob(f"*/{table}.csv")]
    return sorted({path.parent.name for path in paths} - {"paper"})


def drawing() -> AbstractContextManager[None]:
    """The context in which every figure is drawn."""
    return plt.rc_context(STYLE)  # type: ignore[arg-type]
