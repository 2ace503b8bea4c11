"""What a run leaves behind: config.yaml and metrics.jsonl in its folder first, Weights & Biases as their mirror.

A finished run adds row.json, its line in the results table. ``python -m experiments EXPERIMENT measure`` gathers the
rows of an experiment's finished runs into results/CORPUS/EXPERIMENT.csv, one row a run, nothing averaged,
and, where runs are evaluated on their way, what they logged into results/CORPUS/EXPERIMENT_curves.csv.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from tqdm import tqdm

from vocabfold.errors import UserError, needed
from vocabfold.files import write_text
from vocabfold.runs.settings import Settings
from vocabfold.runs.tables import IDENTITY_COLUMNS, RESULTS, SORTED_BY, WHOLE_COLUMNS, read_rows, write_table

if TYPE_CHECKING:
    import pandas as pd

# Columns by which runs are told apart in Weights & Biases, each a tag such as head:folded.
TAG_COLUMNS = ("corpus", "model", "head", "scorer", "partition_order", "embedding", "training_tokens")
CONNECTING_SECONDS = 20  # that its server may take to answer before a run gives up
MOST_TAG_LETTERS = 64  # that its server takes
# What its summary keeps of a logged metric beside the last value: validation_loss_nats.min and so on.
SUMMARIES = {
    "train_loss": "min",
    "validation_loss_nats": "min",
    "excess_loss_nats": "min",
    "perplexity": "min",
    "validation_accuracy": "max",
    "validation_group_accuracy": "max",
    "validation_token_accuracy": "max",
    "peak_memory_gib": "max",
}
RESULT = "result"  # the summary's key for the whole result row: result.validation_loss_nats is the table's value


class RunRecord:
    """The record of one run that is under way, from ``resume_step`` on: later metrics of a killed run are dropped.

    ``tagged``: columns of its result row that are known before it ends, for the mirror's tags.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        resume_step: int,
        tagged: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {folder} ({error.strerror}): set run_dir=FOLDER") from error
        config = dataclasses.asdict(settings)
        write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= resume_step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.path.open("a", encoding="utf-8")
        known = {"corpus": settings.corpus, "model": settings.model.name, "training_tokens": settings.training_tokens}
        tags = tags_of({**known, **(tagged or {})})
        self.wandb_run = self._start_mirror(folder, settings, tags, job_type_of(settings))

    @staticmethod
    def _start_mirror(folder: Path, settings: Settings, tags: list[str], job_type: str) -> Any:
        if settings.wandb.mode == "disabled":
            return None
        os.environ.setdefault("WANDB_SILENT", "true")
        # a second of import time that runs without a mirror need not pay
        wandb = needed("wandb", "a mirror to Weights & Biases (without one: wandb.mode=disabled)")

        if settings.wandb.mode == "online":
            tqdm.write(f"connecting to Weights & Biases (at most {CONNECTING_SECONDS} s)", file=sys.stderr)

        try:
            run = wandb.init(
                project=settings.wandb.project,
                entity=settings.wandb.entity,
                group=settings.wandb.group or f"{settings.corpus}/{settings.experiment}",
                job_type=job_type,
                tags=tags,
                name=folder.name,
                config=dataclasses.asdict(settings),
                dir=str(folder),
                mode="online" if settings.wandb.mode == "online" else "offline",
                settings=wandb.Settings(
                    console="off", x_disable_stats=True, disable_git=True, init_timeout=CONNECTING_SECONDS
                ),
            )
        except (wandb.Error, ValueError) as error:  # a key that is none is a ValueError
            reason = " ".join(str(error).split()).partition(" Consider increasing")[0]
            raise UserError(
                f"Weights & Biases cannot start ({reason}): use wandb.mode=offline or wandb.mode=disabled"
            ) from error
        for metric, best in SUMMARIES.items():
            run.define_metric(metric, summary=best)
        return run

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line for ``step``; it is on disk, for a reader, when this returns."""
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        if self.wandb_run is not None:
            self.wandb_run.log(metrics, step=step)

    def finish(self, row: dict[str, Any]) -> None:
        """Write row.json, which is what makes the run count as finished, and close the mirror."""
        self.close()
        write_text(self.path.with_name("row.json"), json.dumps(row, indent=1) + "\n")
        if self.wandb_run is not None:
            self.wandb_run.summary.update({RESULT: row})
            self.wandb_run.finish()

    def fail(self) -> None:
        """Close everything after an error, without a row."""
        self.close()
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=1)

    def close(self) -> None:
        """Close metrics.jsonl."""
        self.file.close()


def job_type_of(settings: Settings) -> str:
    """``train``; of a run made from a finished one ``fold``, or with its embedding compressed ``recover`` if it is
    trained on, else ``measure``."""
    if settings.start.type == "compress":
        return "measure" if settings.budget.tokens == 0 else "recover"
    return "train" if settings.start.type == "none" else settings.start.type


def tags_of(row: Mapping[str, Any]) -> list[str]:
    """A tag for each of TAG_COLUMNS that has a value."""
    return [f"{name}:{row[name]}"[:MOST_TAG_LETTERS] for name in TAG_COLUMNS if row.get(name)]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl; a last line that a killed run half wrote is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        metrics = [json.loads(line) for line in lines if line.endswith("\n")]
        if not all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in metrics):
            raise ValueError("a line without a step")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): delete the run folder and train again") from error
    return metrics


def finished_row(folder: Path) -> dict[str, Any] | None:
    """The result row of a finished run, None for a run that has not finished."""
    path = folder / "row.json"
    if not path.is_file():
        return None
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(row, dict):
            raise ValueError("it holds no result row")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): delete the run folder and train again") from error
    return row


def finished_runs(experiment: str, corpus: str, results: Path = RESULTS) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, result row) of each finished run of an experiment on a text, oldest first; of folders that hold the
    same run the last finished. Raises UserError where no run has finished."""
    folder = results / "runs" / corpus / experiment
    paths = sorted(folder.glob("*/row.json"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise UserError(f"{folder} holds no finished run: train experiment={experiment} on that text first")
    last: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in paths:
        if (row := finished_row(path.parent)) is not None:
            if "run" not in row:
                raise UserError(f"{path} has no run: another version wrote it; delete the run folder and train again")
            last.pop(row["run"], None)
            last[row["run"]] = (path.parent, row)
    return list(last.values())


def collect(experiment: str, corpus: str, results: Path = RESULTS, with_curves: bool = False) -> Path:
    """Gather the finished runs of an experiment into its table; return the table's path. ``with_curves``: what they
    logged too, even where no run was evaluated before its end.

    Rows of runs that are not in results/runs (trained elsewhere, or deleted since) stay. Raises UserError where no run
    has finished, and where the table is another version's.
    """
    import pandas as pd  # see runs.tables

    runs = finished_runs(experiment, corpus, results)
    rows = [row for _, row in runs]
    metrics = [read_metrics(folder) for folder, _ in runs]
    if with_curves or any(sum("validation_loss_nats" in line for line in lines) > 1 for lines in metrics):
        write_curves(rows, metrics, results / corpus / f"{experiment}_curves.csv")
    path = results / corpus / f"{experiment}.csv"
    return write_table(beside_others(pd.DataFrame(rows), path), path)


def beside_others(rows: pd.DataFrame, path: Path, column: str = "run") -> pd.DataFrame:
    """``rows`` behind those in the table at ``path`` that have another value in ``column``. Raises UserError for a
    table without that column."""
    import pandas as pd

    if not path.is_file():
        return rows
    table = read_rows(path)
    if column not in table.columns:
        raise UserError(f"{path} has no column {column}: another version wrote it; move it away")
    others = table[~table[column].isin(rows[column])]
    return pd.concat([others, rows], ignore_index=True) if len(others) else rows


def write_curves(rows: list[dict[str, Any]], metrics: list[list[dict[str, Any]]], path: Path) -> None:
    """Write what runs that are evaluated on their way logged: a line for each run and logged step."""
    import pandas as pd

    curves = pd.DataFrame(
        [
            line | {name: row.get(name) for name in IDENTITY_COLUMNS}
            for row, lines in zip(rows, metrics, strict=True)
            for line in lines
        ]
    )
    # Of the whole run, and noisy from line to line: they stand in the run's own row.
    curves = curves.drop(columns=["flops_per_token", "peak_memory_gib", "process_high_water_gib"], errors="ignore")
    curves = beside_others(curves, path)
    curves[WHOLE_COLUMNS] = curves[WHOLE_COLUMNS].astype("Int64")
    curves = curves.drop_duplicates(["run", "step"], keep="last").sort_values([*SORTED_BY, "run", "step"])
    write_text(path, curves.to_csv(index=False))
