"""The only training program: one model, one head, one corpus. ``python -m vocabfold.train --help`` tells the rest.

Read it from ``train`` down: settings, data, model, then one loop of steps, evaluations and checkpoints.
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the profiler's remark on memory that is older than itself

import contextlib
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

from vocabfold.command_line import INTERRUPTED_STATUS, Interrupted, one_line_errors
from vocabfold.data.batches import BatchPlan
from vocabfold.data.corpora import Corpus, load_data
from vocabfold.data.shapes import Shapes
from vocabfold.embeddings.build import describe_embedding
from vocabfold.errors import UserError
from vocabfold.heads import HeadLoss
from vocabfold.heads.describe import describe_head
from vocabfold.machine import BYTES_PER_GIB, code_commit
from vocabfold.measure.allocator import keep_freed_memory
from vocabfold.measure.flops import flops_without_trace
from vocabfold.measure.memory import live_tensors, peak_memory_of
from vocabfold.runs.checkpoint import PROGRESS, delete_checkpoint, save_weights
from vocabfold.runs.distributed import MeanLosses, Ranks, choose_device, join_ranks, take_ranks_from_submitit
from vocabfold.runs.folder import occupied
from vocabfold.runs.identity import identify, refuse_other_run
from vocabfold.runs.jobs import check_options, check_row, in_order, one_line_job, outcome
from vocabfold.runs.load import autocast
from vocabfold.runs.optimizer import build_optimizer, learning_rate_at
from vocabfold.runs.parallel import gradients_shared, number, share_model
from vocabfold.runs.record import RunRecord, finished_row
from vocabfold.runs.row import evaluation_columns, result_row
from vocabfold.runs.settings import CONFIG_FOLDER, Settings, settings_from
from vocabfold.runs.stopping import stop_requests
from vocabfold.start import adopt, begin
from vocabfold.tokens import IGNORE_INDEX

# The first steps are slow (the optimizer makes its state, kernels are chosen) and one of them is measured for memory.
WARM_UP_STEPS = 3


class Trainer:
    """What one training run holds between its steps."""

    def __init__(self, settings: Settings, corpus: Corpus | Shapes, ranks: Ranks, device: torch.device) -> None:
        self.settings, self.corpus, self.ranks, self.device = settings, corpus, ranks, device
        plan = BatchPlan(settings.sequence_length, settings.batch_size, settings.seed, ranks.rank, ranks.world_size)
        self.batches = corpus.batches("train", plan)
        self.valid = corpus.batches("valid", replace(plan, batch_size=settings.evaluation_batch_size))
        torch.manual_seed(settings.seed)
        # what is larger than a device begins in the machine's memory
        begun = begin(settings, corpus, self.batches, torch.device("cpu") if settings.parallel == "fsdp" else device)
        self.model, self.trained, self.first_batch = begun.model, begun.learner, begun.first_batch
        self.measured = begun.measured
        self.description = {
            **describe_head(settings.head, self.model.head),
            **describe_embedding(settings.embedding, self.model.embedding),
        }
        self.shared = share_model(settings.parallel, self.model, settings.precision, device, ranks)
        self.optimizer = build_optimizer(settings.optimizer, self.model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.total_steps = settings.total_steps(self.batches.batches_per_epoch, self.batches.targets_per_batch)
        self.step = self.tokens = self.timed_tokens = 0
        self.timed_seconds = 0.0
        self.checkpoint_step: int | None = None
        self.saved_at = time.monotonic()

    def begin(self) -> None:
        """Go on from the folder's checkpoint, if it has one. Raises UserError where it does not fit."""
        folder = Path(self.settings.run_dir)
        if (progress := self.shared.load(folder, self.optimizer, self.device)) is not None:
            self.scaler.load_state_dict(progress.pop("scaler"))
            vars(self).update(progress)
            self.checkpoint_step = self.step
        else:
            self.measured["flops_per_token"] = self.flops_per_token()
        if self.settings.compile:
            self.trained = torch.compile(self.trained)  # type: ignore[assignment]
        self.trained = self.shared.parallel(self.trained)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision that the settings ask for."""
        return autocast(self.device, self.settings.precision)

    def flops_per_token(self) -> float:
        """FLOPs of one forward and backward pass, a target. The model and the random state stay as they were."""
        inputs, targets = (tensor.to(self.device) for tensor in self.batches.batch(0))

        def forward_and_backward() -> None:
            with self.autocast():
                self.trained(inputs, targets).loss.backward()

        flops = flops_without_trace(forward_and_backward, targets.numel(), self.model, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        return flops

    def learning_rate(self) -> float:
        """Of the step to come. A falling schedule follows the budget that is furthest used up."""
        used = self.step / self.total_steps if self.total_steps is not None else 0.0
        if (seconds := self.settings.budget.seconds) is not None:
            used = max(used, self.timed_seconds / seconds)
        return learning_rate_at(self.settings.optimizer, self.step, used)

    def train_step(self, learning_rate: float, with_accuracy: bool) -> dict[str, float]:
        """One optimizer step over ``gradient_accumulation`` batches: {train_loss, gradient_norm, the head's parts}.

        Every counted target of the whole step, over all its batches and processes, weighs the same.
        """
        accumulation, world_size = self.settings.gradient_accumulation, self.ranks.world_size
        first = self.first_batch + self.step * accumulation
        batches = [self.batches.batch(index) for index in range(first, first + accumulation)]
        counts = torch.tensor([float((targets != IGNORE_INDEX).sum()) for _, targets in batches], device=self.device)
        total = max(1.0, float(self.ranks.sum_of(counts.sum())))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        sums = MeanLosses()
        for index, (inputs, targets) in enumerate(batches):
            inputs, targets = inputs.to(self.device), targets.to(self.device)
            with gradients_shared(self.trained, now=index == accumulation - 1):
                with self.autocast():
                    output: HeadLoss = self.trained(inputs, targets, with_accuracy)
                # DDP and FSDP average over processes what has to be a sum, hence world_size.
                self.scaler.scale(output.loss * (counts[index] * world_size / total)).backward()
            sums.add(output)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.optimizer.gradient_clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.tokens += int(total)
        return {**sums.means(self.ranks, "train_"), "gradient_norm": number(norm)}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean losses and accuracies over every target of the validation set, in nats, and the perplexity. Raises
        UserError where the loss is not finite."""
        self.model.eval()
        sums = MeanLosses()
        bar = self.ranks.progress_bar(total=self.valid.num_evaluation_batches, desc="validation", leave=False, delay=1)
        for inputs, targets in self.valid.evaluation_batches():
            with self.autocast():
                inputs, targets = inputs.to(self.device), targets.to(self.device)
                sums.add(self.model(inputs, targets, True, self.corpus.reports_accuracy))
            bar.update()
        bar.close()
        self.model.train()
        result = evaluation_columns(sums.means(self.ranks, "validation_"), self.corpus)
        if not math.isfinite(result["validation_loss_nats"]):
            raise UserError(not_finite(self, result["validation_loss_nats"]))
        return result

    def save(self) -> None:
        """Write a checkpoint of this very step."""
        progress = {name: getattr(self, name) for name in PROGRESS if name != "scaler"}
        folder = Path(self.settings.run_dir)
        self.shared.save(folder, self.optimizer, scaler=self.scaler.state_dict(), **progress)
        self.checkpoint_step, self.saved_at = self.step, time.monotonic()

    def checkpoint_is_due(self) -> bool:
        """Whether the settings want a checkpoint of this step."""
        every, minutes = self.settings.checkpoint_every, self.settings.checkpoint_minutes
        if every is not None and self.step % every == 0:
            return True
        return self.shared.is_late(minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes)

    def has_ended(self) -> bool:
        """Whether a budget is used up."""
        if self.total_steps is not None and self.step >= self.total_steps:
            return True
        seconds = self.settings.budget.seconds
        return seconds is not None and self.ranks.first_decides(self.timed_seconds >= seconds, self.device)

    def position(self) -> str:
        """Where the run stands in its data, for a person."""
        last_batch = self.step * self.settings.gradient_accumulation - 1
        epoch, batch = divmod(last_batch, self.batches.batches_per_epoch)
        return f"step {self.step} (epoch {epoch}, batch {batch} of {self.batches.batches_per_epoch})"

    def timed_step(self, with_accuracy: bool) -> dict[str, float]:
        """One training step on the clock; the last one of the warm-up is measured for memory instead."""
        learning_rate, tokens_before, started = self.learning_rate(), self.tokens, time.perf_counter()
        metrics: dict[str, float] = {}

        def step() -> None:
            metrics.update(self.train_step(learning_rate, with_accuracy))

        if self.step == WARM_UP_STEPS - 1:
            memory = peak_memory_of(step, self.device, live_tensors(self.model, self.optimizer))
            self.measured["peak_memory_gib"] = memory.peak_bytes / BYTES_PER_GIB
            if memory.process_high_water_bytes is not None:
                self.measured["process_high_water_gib"] = memory.process_high_water_bytes / BYTES_PER_GIB
        else:
            step()
        if self.step > WARM_UP_STEPS:
            self.timed_seconds += time.perf_counter() - started
            self.timed_tokens += self.tokens - tokens_before
        return {**metrics, "learning_rate": learning_rate, "tokens": self.tokens}

    def speed_and_memory(self) -> dict[str, float]:
        """What was measured so far. Tokens per second: of the steps after the warm-up, data, forward, backward and
        optimizer included, evaluation left out."""
        if not self.timed_tokens:
            return self.measured
        return {"tokens_per_second": self.timed_tokens / self.timed_seconds, **self.measured}


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


def not_finite(trainer: Trainer, loss: float) -> str:
    """What happened, where, and how to go on."""
    if trainer.checkpoint_step is None:
        last_good = "no checkpoint was written before"
    else:
        last_good = f"the last good checkpoint is of step {trainer.checkpoint_step} in {trainer.settings.run_dir}"
    return f"the loss is {loss} at {trainer.position()}; {last_good}; try a lower optimizer.learning_rate"


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
