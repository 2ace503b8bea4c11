"""What a claim is, and the rule by which its verdict follows from the tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from experiments.paper.figure3_group_size import read_reference
from experiments.paper.main_comparison import MARGIN_NATS
from experiments.study.statistics import Difference
from vocabfold.errors import UserError
from vocabfold.runs.tables import RESULTS, read_rows

REPRODUCED, PARTLY, NOT_REPRODUCED = "reproduced", "partly", "not reproduced"
UNTESTABLE, NOT_RUN = "cannot be tested here", "not run"


@dataclass(frozen=True)
class Check:
    """Something that must be so for a claim to hold: what is ``asked``, what was ``found``, whether that is enough."""

    asked: str
    found: str
    met: bool


@dataclass(frozen=True)
class Finding:
    """What the tables say of a claim: its checks; or why nothing here can test it; or which table is not there."""

    checks: tuple[Check, ...] = ()
    untestable: str = ""
    problem: str = ""

    @property
    def verdict(self) -> str:
        """Reproduced if every check is met, partly if some are, not reproduced if none is."""
        if self.problem:
            return NOT_RUN
        if self.untestable:
            return UNTESTABLE
        met = [check.met for check in self.checks]
        return REPRODUCED if all(met) else PARTLY if any(met) else NOT_REPRODUCED

    @property
    def ours(self) -> str:
        """What was found, in one line."""
        return self.problem or self.untestable or "; ".join(check.found for check in self.checks)


@dataclass(frozen=True)
class Claim:
    """One claim of a paper.

    ``where`` in the paper it stands, ``published`` its value there (a function where the value is read from
    results/paper), ``judge``: the corpus -> what our tables say, which raises UserError where a table is missing or
    another version's. ``evidence``: figures and tables under results/, {corpus} put in. ``command`` makes them.
    """

    where: str
    statement: str
    published: Callable[[], str]
    judge: Callable[[str], Finding]
    evidence: tuple[str, ...]
    command: str

    def judged(self, corpus: str) -> Finding:
        """The finding; a table that is missing or another version's is a finding too."""
        try:
            return self.judge(corpus)
        except UserError as error:
            return Finding(problem=str(error))


@dataclass(frozen=True)
class Source:
    """A paper and its claims."""

    title: str
    link: str
    claims: tuple[Claim, ...]


def at_least(asked: str, value: float, bound: float, form: str, found: str = "{}") -> Check:
    """``value`` must be ``bound`` or more; ``form`` writes both, and ``found`` has a place for the value."""
    return Check(f"{asked}: at least {form.format(bound)}", found.format(form.format(value)), bool(value >= bound))


def at_most(asked: str, value: float, bound: float, form: str, found: str = "{}") -> Check:
    """``value`` must be ``bound`` or less."""
    return Check(f"{asked}: at most {form.format(bound)}", found.format(form.format(value)), bool(value <= bound))


def on_par(asked: str, difference: Difference, found: str = "") -> Check:
    """The upper end of the 95% interval of a loss difference must be at most MARGIN_NATS. Raises UserError below two
    seeds."""
    if difference.count < 2:
        raise UserError(f"{asked}: fewer than two seeds have both: run its training to the end")
    words = f"{found}{difference.mean:+.3f} ± {difference.half_width:.3f} nats over {difference.count} seeds"
    bound = f"{asked}: upper end of the 95% interval at most {MARGIN_NATS:+.2f} nats"
    return Check(bound, words, difference.high <= MARGIN_NATS)


def fixed(words: str) -> Callable[[], str]:
    """A published value that stands in no table."""
    return lambda: words


def reference(name: str) -> pd.DataFrame:
    """results/paper/NAME.csv: published values. Raises UserError where it is missing."""
    return read_reference(RESULTS / "paper" / f"{name}.csv", "restore it from the repository")


def published_extreme(name: str, column: str, highest: bool, unit: str) -> str:
    """Where a published curve of Figure 3 has its top or bottom."""
    table = reference(name).sort_values(column, ascending=not highest)
    return f"S = {table['group_size'].iloc[0]}, {table[column].iloc[0]:.2f} {unit}"


def with_columns(table: pd.DataFrame, path: str, columns: tuple[str, ...]) -> pd.DataFrame:
    """The table itself. Raises UserError where a column is missing that the claim needs."""
    if missing := [name for name in columns if name not in table.columns]:
        raise UserError(f"{path} has no column {missing[0]}: another version wrote it; measure again")
    return table


def measured(folder: str, name: str, command: str, columns: tuple[str, ...]) -> pd.DataFrame:
    """results/FOLDER/NAME.csv of a benchmark program. Raises UserError where it is missing or another version's."""
    path = RESULTS / folder / f"{name}.csv"
    if not path.is_file():
        raise UserError(f"{path} is missing: run {command} first")
    return with_columns(read_rows(path), str(path), columns)


def rows_where(table: pd.DataFrame, name: str, **values: object) -> pd.DataFrame:
    """The rows with these values. Raises UserError where there is none."""
    for column, value in values.items():
        table = table[table[column] == value]
    if table.empty:
        wanted = ", ".join(f"{column}={value}" for column, value in values.items())
        raise UserError(f"{name} has no row with {wanted}: another version wrote it; measure again")
    return table


def existing(evidence: tuple[str, ...], corpus: str) -> list[Path]:
    """Those of the files that are there."""
    paths = [RESULTS / name.format(corpus=corpus) for name in evidence]
    return [path for path in paths if path.is_file()]
