"""Finished runs gathered into a table with columns of their settings, where those are what an experiment varies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from experiments.study.measuring import corpora_with_runs, corpus_of
from vocabfold.runs.record import beside_others, finished_runs
from vocabfold.runs.settings import Settings, load_settings
from vocabfold.runs.tables import RESULTS, write_table


def budget_columns(settings: Settings) -> dict[str, Any]:
    """The tokens of the text that a run was let see, and how often it was to read them."""
    return {"training_tokens": settings.training_tokens, "epochs": settings.budget.epochs}


def collect_with_settings(
    experiment: str, settings: Sequence[str], columns: Callable[[Settings], dict[str, Any]] = budget_columns
) -> None:
    """As ``measuring.collect_runs``, each row with ``columns`` of its run's settings. Rows of runs that are not here
    stay. Raises UserError where no run has finished."""
    for corpus in [corpus_of(settings)] if settings else corpora_with_runs(experiment):
        rows = [row | columns(load_settings(folder)) for folder, row in finished_runs(experiment, corpus)]
        path = RESULTS / corpus / f"{experiment}.csv"
        print(f"wrote {write_table(beside_others(pd.DataFrame(rows), path), path)}")
