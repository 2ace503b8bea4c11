"""What a training run does with its model: steps, evaluations and checkpoints. train.py decides when."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vocabfold.data.batches import BatchPlan
from vocabfold.data.composing import Undrawn
from vocabfold.data.corpora import Corpus
from vocabfold.data.shapes import Shapes
from vocabfold.embeddings.build import describe_embedding
from vocabfold.errors import UserError
from vocabfold.heads import HeadLoss
from vocabfold.heads.describe import describe_head
from vocabfold.machine import BYTES_PER_GIB
from vocabfold.measure.flops import flops_without_trace
from vocabfold.measure.memory import live_tensors, peak_memory_of
from vocabfold.runs.capture import CapturedStep
from vocabfold.runs.checkpoint import PROGRESS
from vocabfold.runs.distributed import MeanLosses, Ranks, means_of
from vocabfold.runs.load import autocast
from vocabfold.runs.optimizer import build_optimizer, learning_rate_at
from vocabfold.runs.parallel import gradients_shared, number, share_model
from vocabfold.runs.row import evaluation_columns
from vocabfold.runs.settings import Settings
from vocabfold.start import begin
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
        self.captured: CapturedStep | None = None

    def begin(self) -> None:
        """Go on from the folder's checkpoint, if it has one. Raises UserError where it does not fit."""
        folder = Path(self.settings.run_dir)
        if (progress := self.shared.load(folder, self.optimizer, self.device)) is not None:
            for group in self.optimizer.param_groups:
                group["capturable"] = self.device.type == "cuda"  # whatever device the checkpoint is from
            self.scaler.load_state_dict(progress.pop("scaler"))
            vars(self).update(progress)
            self.checkpoint_step = self.step
        else:
            self.measured["flops_per_token"] = self.flops_per_token()
        self.captured = self.captured_step()
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
        accumulation = self.settings.gradient_accumulation
        first = self.first_batch + self.step * accumulation
        batches = [self.batches.batch(index) for index in range(first, first + accumulation)]
        counts = torch.tensor([float((targets != IGNORE_INDEX).sum()) for _, targets in batches])
        total = max(1.0, self.ranks.total(float(counts.sum()), self.device))
        # DDP and FSDP average over processes what has to be a sum, hence world_size.
        weights = counts * self.ranks.world_size / total
        if self.captured is not None:
            inputs, targets = (part.to(self.device) for part in batches[0])
            totals = self.captured((inputs, targets, weights, torch.tensor(learning_rate)), with_accuracy)
            norm = totals.pop("gradient_norm")
            metrics = means_of(totals, "train_")
        else:
            sums, norm_of = self.descend(batches, weights.to(self.device), learning_rate, with_accuracy)
            metrics, norm = sums.means(self.ranks, "train_"), number(norm_of)
        self.step += 1
        self.tokens += int(total)
        return {**metrics, "gradient_norm": norm}

    def descend(
        self,
        batches: Sequence[tuple[Tensor | Undrawn, Tensor]],
        weights: Tensor,
        learning_rate: float | Tensor,
        with_accuracy: bool,
    ) -> tuple[MeanLosses, Tensor]:
        """Forward, backward and the optimizer's step on ``batches``, each of which has a weight in the loss: (the
        losses, the gradient's norm before it is clipped)."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        sums = MeanLosses()
        for index, (inputs, targets) in enumerate(batches):
            inputs, targets = inputs.to(self.device), targets.to(self.device)
            with gradients_shared(self.trained, now=index == len(batches) - 1):
                with self.autocast():
                    output: HeadLoss = self.trained(inputs, targets, with_accuracy)
                self.scaler.scale(output.loss * weights[index]).backward()
            sums.add(output)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.optimizer.gradient_clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return sums, norm

    def captured_step(self) -> CapturedStep | None:
        """``descend`` as a CUDA graph, where this run's steps can be one: of one batch in one process, all on the
        device."""
        settings = self.settings
        alone = self.ranks.world_size == 1 and settings.parallel == "ddp" and settings.gradient_accumulation == 1
        plain = self.trained is self.model and settings.precision != "fp16" and not settings.compile
        if not (self.device.type == "cuda" and alone and plain and self.model.head.capturable):
            return None

        def step(inputs: tuple[Tensor, ...], with_accuracy: bool) -> dict[str, Tensor]:
            tokens, targets, weights, learning_rate = inputs
            sums, norm = self.descend([(tokens, targets)], weights, learning_rate, with_accuracy)
            return {**sums.totals, "gradient_norm": norm}

        tokens, targets = (part.to(self.device) for part in self.batches.batch(self.first_batch))
        return CapturedStep(step, (tokens, targets, torch.empty(1), torch.empty(())), self.device)

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


def not_finite(trainer: Trainer, loss: float) -> str:
    """What happened, where, and how to go on."""
    if trainer.checkpoint_step is None:
        last_good = "no checkpoint was written before"
    else:
        last_good = f"the last good checkpoint is of step {trainer.checkpoint_step} in {trainer.settings.run_dir}"
    return f"the loss is {loss} at {trainer.position()}; {last_good}; try a lower optimizer.learning_rate"
