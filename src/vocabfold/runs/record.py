"""What a run leaves behind: config.yaml and metrics.jsonl in its folder first, Weights & Biases as their mirror.

A finished run adds row.json, its line in the results table. ``python -m vocabfold.runs.record EXPERIMENT SCALE``
gathers the rows of an experiment's finished runs into results/SCALE/EXPERIMENT.csv, one row a run, nothing averaged,
and, where runs are evaluated on their way, what they logged into results/SCALE/EXPERIMENT_curves.csv.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from tqdm import tqdm

from vocabfold.command_line import one_line_errors
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.runs.settings import Settings

RESULTS = Path("results")
RUN_COLUMNS = [
    "experiment",
    "scale",
    "corpus",
    "seed",
    "model",
    "hidden_size",
    "num_layers",
    "head",
    "scorer",
    "partition_order",
    "group_size",
    "num_groups",
    "shortlist",
    "tied",
    "learning_rate",
    "steps",
    "tokens",
    "validation_loss_nats",
    "perplexity",
    "group_accuracy",
    "tokens_per_second",
    "peak_memory_gib",
    "flops_per_token",
    "num_parameters",
]
ORIGIN_COLUMNS = ["hardware", "torch", "commit", "command"]
# Two runs that agree in these are the same measurement; the table keeps the newer one.
IDENTITY_COLUMNS = RUN_COLUMNS[: RUN_COLUMNS.index("learning_rate") + 1]
# The same of an experiment's own columns, where its rows have them.
OWN_IDENTITY_COLUMNS = ["vocabulary_size", "distillation_tokens", "sorted_by", "class"]
OWN_IDENTITY_COLUMNS += ["embedding", "embedding_setting", "recovery_tokens", "writer", "judge"]

# Columns by which runs are told apart in Weights & Biases, each a tag such as head:grouped.
TAG_COLUMNS = ("scale", "corpus", "model", "contender", "head", "scorer", "partition_order", "embedding")
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

    ``tagged``: columns of its result row that are known before it ends, for the mirror's tags. ``job_type``: what kind
    of run the mirror shows; None finds it in the settings.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        resume_step: int,
        tagged: Mapping[str, Any] | None = None,
        job_type: str | None = None,
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
        tags = tags_of({"scale": settings.scale, "model": settings.model.name, **(tagged or {})})
        self.wandb_run = self._start_mirror(folder, settings, tags, job_type or job_type_of(settings))

    @staticmethod
    def _start_mirror(folder: Path, settings: Settings, tags: list[str], job_type: str) -> Any:
        if settings.wandb.mode == "disabled":
            return None
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # a second of import time that runs without a mirror need not pay

        if settings.wandb.mode == "online":
            tqdm.write(f"connecting to Weights & Biases (at most {CONNECTING_SECONDS} s)", file=sys.stderr)

        try:
            run = wandb.init(
                project=settings.wandb.project,
                entity=settings.wandb.entity,
                group=f"{settings.scale}/{settings.experiment}",
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
            raise UserError(
                f"Weights & Biases cannot start ({error}): use wandb.mode=offline or wandb.mode=disabled"
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
    """``train``; with the compressed embedding of a finished run ``recover`` if it is trained on, else ``measure``."""
    if settings.embedding.compressed_from is None:
        return "train"
    return "measure" if settings.budget.tokens == 0 else "recover"


def tags_of(row: Mapping[str, Any]) -> list[str]:
    """A tag for each of TAG_COLUMNS that has a value, without the seed of a random order."""
    values = {name: re.sub(r"_seed\d+$", "", str(row[name])) for name in TAG_COLUMNS if row.get(name)}
    return [f"{name}:{value}"[:MOST_TAG_LETTERS] for name, value in values.items()]


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


def finished_runs(experiment: str, scale: str, results: Path = RESULTS) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, result row) of each finished run of an experiment, the last finished of those that are the same
    measurement, oldest first. Raises UserError where no run has finished."""
    folder = results / "runs" / scale / experiment
    paths = sorted(folder.glob("*/row.json"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise UserError(f"{folder} holds no finished run: run `make everything SCALE={scale}` first")
    rows = [row for path in paths if (row := finished_row(path.parent)) is not None]
    names = IDENTITY_COLUMNS + [name for name in OWN_IDENTITY_COLUMNS if any(name in row for row in rows)]
    last = {tuple(row.get(name) for name in names): index for index, row in enumerate(rows)}
    return [(paths[index].parent, rows[index]) for index in sorted(last.values())]


def collect(experiment: str, scale: str, results: Path = RESULTS) -> Path:
    """Gather the finished runs of an experiment into its table; return the table's path.

    Raises UserError where no run has finished.
    """
    runs = finished_runs(experiment, scale, results)
    rows = [row for _, row in runs]
    metrics = [read_metrics(folder) for folder, _ in runs]
    if any(sum("validation_loss_nats" in line for line in lines) > 1 for lines in metrics):
        write_curves(rows, metrics, results / scale / f"{experiment}_curves.csv")
    return write_table(pd.DataFrame(rows), results / scale / f"{experiment}.csv")


def write_curves(rows: list[dict[str, Any]], metrics: list[list[dict[str, Any]]], path: Path) -> None:
    """Write what runs that are evaluated on their way logged: a line for each run and logged step."""
    identity = [name for name in [*IDENTITY_COLUMNS, "contender"] if any(name in row for row in rows)]
    curves = pd.DataFrame(
        [
            line | {name: row.get(name) for name in identity}
            for row, lines in zip(rows, metrics, strict=True)
            for line in lines
        ]
    )
    # Of the whole run, and noisy from line to line: they stand in the run's own row.
    curves = curves.drop(columns=["flops_per_token", "peak_memory_gib", "process_high_water_gib"], errors="ignore")
    curves = curves.drop_duplicates([*identity, "step"], keep="last").sort_values([*identity, "step"])
    write_text(path, curves.to_csv(index=False))


def write_table(rows: pd.DataFrame, path: Path) -> Path:
    """Write a results table with its columns in the agreed order and one row for each measurement."""
    own = [name for name in rows.columns if name not in RUN_COLUMNS + ORIGIN_COLUMNS]
    table = rows.reindex(columns=RUN_COLUMNS + own + ORIGIN_COLUMNS)
    whole = ["group_size", "num_groups", "shortlist"]
    table[whole] = table[whole].astype("Int64")
    identity = IDENTITY_COLUMNS + [name for name in OWN_IDENTITY_COLUMNS if name in own]
    table = table.drop_duplicates(identity, keep="last").sort_values(identity)
    write_text(path, table.to_csv(index=False))
    return path


def read_table(experiment: str, scale: str, results: Path = RESULTS) -> pd.DataFrame:
    """The committed or collected table of an experiment. Raises UserError where there is none or it is another's."""
    path = results / scale / f"{experiment}.csv"
    if not path.is_file():
        raise UserError(f"{path} is missing: run `make everything SCALE={scale}` first")
    table = pd.read_csv(path)
    if missing := [name for name in RUN_COLUMNS + ORIGIN_COLUMNS if name not in table.columns]:
        raise UserError(f"{path} has no column {missing[0]}: another version wrote it; run `make everything` again")
    return table


@one_line_errors
def main() -> None:
    """Command line: EXPERIMENT SCALE."""
    if len(sys.argv) != 3:
        raise UserError("usage: python -m vocabfold.runs.record EXPERIMENT SCALE")
    print(f"wrote {collect(sys.argv[1], sys.argv[2])}")


if __name__ == "__main__":
    main()
