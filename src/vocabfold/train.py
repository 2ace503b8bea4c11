"""The only training program: one model, one head, one corpus. ``python -m vocabfold.train --help`` tells the rest.

Read it from ``train`` down: settings, data, model, then one loop of steps, evaluations and checkpoints.
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the profiler's remark on memory that is older than itself

import contextlib
import math
import sys
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from tqdm import tqdm

from vocabfold.command_line import INTERRUPTED_STATUS, Interrupted, one_line_errors
from vocabfold.data.corpora import load_data
from vocabfold.errors import UserError
from vocabfold.machine import code_commit
from vocabfold.measure.allocator import keep_freed_memory
from vocabfold.runs.capture import own_stream
from vocabfold.runs.checkpoint import delete_checkpoint, save_weights
from vocabfold.runs.distributed import (
    choose_device,
    join_ranks,
    take_ranks_from_submitit,
)
from vocabfold.runs.folder import occupied
from vocabfold.runs.identity import identify, refuse_other_run
from vocabfold.runs.jobs import check_options, check_row, in_order, one_line_job, outcome
from vocabfold.runs.record import RunRecord, finished_row
from vocabfold.runs.row import result_row
from vocabfold.runs.settings import CONFIG_FOLDER, Settings, settings_from
from vocabfold.runs.stopping import stop_requests
from vocabfold.start import adopt
from vocabfold.trainer import Trainer, not_finite


def train(settings: Settings, command: str) -> dict[str, Any]:
    """Train one model to the end, resuming where its folder has a checkpoint; return its result row.

    A run that has finished is not trained again. Raises UserError for bad settings or data and where the loss
    stops being finite.
    """
    take_ranks_from_submitit()
    identify(settings)
    folder = Path(settings.run_dir)
    if (row := finished_row(folder)) is not None:
        check_row(folder, row)
        tqdm.write(f"{folder}: finished before (loss {row['validation_loss_nats']:.4f} nats), skipped", file=sys.stderr)
        delete_checkpoint(folder)  # of a process that was killed after its last act but this
        return row
    code_commit()  # read now, and remembered: the tree may change while the run goes on
    device = choose_device(settings.device, settings.precision, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cpu":
        keep_freed_memory()
    else:
        own_stream(device)
    ranks = join_ranks(device.type, even_alone=settings.parallel == "fsdp")
    text = load_data(settings.data).with_development(settings.development_share)
    corpus = text.with_training_tokens(settings.training_tokens)
    trainer = Trainer(settings, corpus, ranks, device)
    with occupied(folder) if ranks.is_first else contextlib.nullcontext():
        if ranks.first_decides(finished_row(folder) is not None, device):  # by another process, just now
            return train(settings, command)
        refuse_other_run(settings)  # which another process may have begun in the meantime
        trainer.begin()
        record = RunRecord(folder, settings, trainer.step, trainer.description) if ranks.is_first else None
        try:
            final = run(trainer, record)
        except BaseException:
            if record is not None:
                record.fail()
            raise
        progress = {"steps": trainer.step, "tokens": trainer.tokens, **trainer.speed_and_memory()}
        model = trainer.shared.whole()
        row = result_row(settings, corpus, model, trainer.description, progress, final, command)
        model.prepare_for_inference()
        if record is not None:
            save_weights(folder, model, {"vocabulary_size": str(corpus.vocabulary_size)})
            record.finish(row)
            delete_checkpoint(folder)
        return row


def run(trainer: Trainer, record: RunRecord | None) -> dict[str, float]:
    """The loop: steps until a budget is used up, logging, evaluations and checkpoints; return the last evaluation.

    Ctrl-C and SIGTERM raise Interrupted after the step that is under way, when its checkpoint is written.
    """
    settings, ranks = trainer.settings, trainer.ranks
    evaluation: dict[str, float] = {}
    if settings.compile and ranks.is_first:
        tqdm.write("torch.compile compiles during the first steps: that takes a minute or more", file=sys.stderr)
    with (
        stop_requests() as request,
        ranks.progress_bar(total=trainer.total_steps, initial=trainer.step, desc=Path(settings.run_dir).name) as bar,
    ):
        if trainer.step == 0 and settings.start.type != "none":
            evaluation = trainer.evaluate()
            trainer.measured["at_once_loss_nats"] = evaluation["validation_loss_nats"]
            if record is not None:
                record.log(0, evaluation)
        while not trainer.has_ended():
            is_logged = (trainer.step + 1) % settings.log_every == 0
            metrics = trainer.timed_step(with_accuracy=is_logged)
            if not math.isfinite(metrics["train_loss"]):
                raise UserError(not_finite(trainer, metrics["train_loss"]))
            bar.update()
            bar.set_postfix(loss=f"{metrics['train_loss']:.3f}", refresh=False)
            ended = trainer.has_ended()
            evaluation = {}
            if ended or (settings.evaluate_every and trainer.step % settings.evaluate_every == 0):
                evaluation = trainer.evaluate()
            if record is not None and (is_logged or evaluation):
                record.log(trainer.step, metrics | trainer.speed_and_memory() | evaluation)
            stopped = ranks.any_of(request.status is not None, trainer.device)
            if stopped or (not ended and trainer.checkpoint_is_due()):
                trainer.save()
            if stopped:
                message = f"interrupted at step {trainer.step}: the same command continues from there"
                raise Interrupted(message, request.status or INTERRUPTED_STATUS)
    return evaluation or trainer.evaluate()


@hydra.main(config_path=str(CONFIG_FOLDER), config_name="train", version_base="1.3")
def run_configured(config: DictConfig) -> float:
    """One job of Hydra's: train, and hand the validation loss to a sweeper that searches."""
    overrides = HydraConfig.get().overrides.task
    command = " ".join(["python -m vocabfold.train", *overrides])
    with one_line_job():
        settings = adopt(settings_from(config), overrides)
        row = train(settings, command)
    if int(os.environ.get("RANK", "0")) == 0:
        tqdm.write(outcome(Path(settings.run_dir), row))
    return float(row["validation_loss_nats"])


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    if not CONFIG_FOLDER.is_dir():
        raise UserError(f"{CONFIG_FOLDER} is missing: run from a checkout installed with `pip install -e .`")
    sys.argv[1:] = in_order(sys.argv[1:])
    check_options(sys.argv[1:])
    # Without this Hydra prints a traceback's tail of its own; with it errors arrive here and become one line.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        run_configured()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
