"""Fold the head of a finished full-softmax run and distil its groups: ``python -m vocabfold.fold RUN_FOLDER``.

The backbone and the tokens' rows stay as they are; the group scorer alone is learned, on the run's own training text,
from the teacher's exact group probabilities. Several runs, orders, shortlists or lengths are folded one after the
other, each into a run folder of its own that vocabfold.generate reads like any other; what has finished is skipped.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vocabfold.command_line import ArgumentParser, one_line_errors
from vocabfold.data.batches import BatchPlan
from vocabfold.data.corpora import load_corpus
from vocabfold.errors import UserError
from vocabfold.heads import FoldedHead, HeadLoss, HeadSettings, equal_partition
from vocabfold.heads.describe import describe_head
from vocabfold.heads.fold import distillation_loss, fold, foldable, group_logits
from vocabfold.heads.kernels import chunks
from vocabfold.heads.settings import ORDERS, PartitionSettings
from vocabfold.machine import code_commit, hardware, torch_version
from vocabfold.measure.allocator import keep_freed_memory
from vocabfold.models.build import ModelWithHead
from vocabfold.runs.checkpoint import save_weights
from vocabfold.runs.distributed import MeanLosses, Ranks, choose_device
from vocabfold.runs.load import load_run
from vocabfold.runs.optimizer import build_optimizer, learning_rate_at
from vocabfold.runs.record import RESULTS, RunRecord, finished_row
from vocabfold.runs.settings import OptimizerSettings, Settings, load_settings
from vocabfold.runs.token_order import token_order
from vocabfold.tokens import IGNORE_INDEX

START_TOKENS = 4096  # whose hidden states fit the groups in closed form; the distillation begins after them
TOKENS = 65536
LEARNING_RATE = 1e-3
ORDER_HELP = "of the vocabulary; clustered: by the run's own input embedding (default frequency)"
TOKENS_HELP = f"to distil on; 0: the closed form alone (default {TOKENS})"
# Of the distillation: the mean over its batches, each before it is learned, tells learning rates apart.
LAST_SHARE = 0.25


class Teacher:
    """A finished run with a full softmax, and its text."""

    def __init__(self, folder: Path, device_name: str) -> None:
        self.folder, self.settings = folder, load_settings(folder)
        self.device = choose_device(device_name, "fp32", 0)
        self.model: ModelWithHead = load_run(folder, self.device).requires_grad_(False)
        self.head = foldable(self.model.head, folder)
        self.corpus = load_corpus(self.settings.data)
        if self.corpus.vocabulary_size != self.head.vocabulary_size:
            raise UserError(f"{folder} was trained on other tokens than its config.yaml names: train it again")
        plan = BatchPlan(self.settings.sequence_length, self.settings.batch_size, self.settings.seed)
        self.batches = self.corpus.batches("train", plan)
        valid_plan = dataclasses.replace(plan, batch_size=self.settings.evaluation_batch_size)
        self.valid = self.corpus.batches("valid", valid_plan)

    @torch.no_grad()
    def hidden(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [N, D] and targets [N] where there is something to predict in a batch [B, T]."""
        hidden = self.model.backbone(inputs.to(self.device)).flatten(0, -2)
        targets = targets.to(self.device).flatten()
        counted = targets != IGNORE_INDEX
        return hidden[counted], targets[counted]

    def start(self) -> tuple[Tensor, int]:
        """Hidden states [N, D] of the first START_TOKENS tokens and how many batches they come from."""
        parts: list[Tensor] = []
        while sum(map(len, parts)) < START_TOKENS:
            parts.append(self.hidden(*self.batches.batch(len(parts)))[0])
        return torch.cat(parts)[:START_TOKENS], len(parts)

    @torch.no_grad()
    def evaluate(self, head: FoldedHead) -> dict[str, float]:
        """The mean losses and accuracies of a head over every target of the validation text."""
        sums = MeanLosses()
        for batch in tqdm(list(self.valid.evaluation_batches()), desc="validation", leave=False):
            sums.add(head.loss(*self.hidden(*batch), with_accuracy=True))
        return sums.means(Ranks(), "validation_")

    @functools.cached_property
    def validation_loss_nats(self) -> float:
        """The teacher's own, on the same positions; a few rows at a time, since its logits are [N, V]."""
        sums = MeanLosses()
        with torch.no_grad():
            for batch in tqdm(list(self.valid.evaluation_batches()), desc="validation of the teacher", leave=False):
                hidden, targets = self.hidden(*batch)
                for part in chunks(len(hidden), self.head.vocabulary_size):
                    sums.add(self.head.loss(hidden[part], targets[part]))
        return sums.means(Ranks(), "")["loss"]


@dataclasses.dataclass(frozen=True)
class Options:
    """One folding: ``partition`` as of a trained head, ``tokens`` to distil on (0: none), Adam's ``learning_rate``."""

    partition: PartitionSettings
    tokens: int
    learning_rate: float

    def check(self) -> None:
        """Raise UserError for the first option that no folding can have."""
        if self.tokens < 0:
            raise UserError(f"--tokens is {self.tokens}: choose 0 (the closed form alone) or more")
        if not self.learning_rate > 0:
            raise UserError(f"--learning-rate is {self.learning_rate}: choose more than 0")

    def folder(self, teacher: Path, settings: Settings) -> Path:
        """Where this folding of a run belongs: the same command finds it again."""
        plain = [str(teacher.resolve().name), *map(str, dataclasses.astuple(self))]
        digest = hashlib.sha256("\n".join(plain).encode()).hexdigest()[:8]
        size = f"-size{self.partition.group_size}" if self.partition.group_size else ""
        name = f"{teacher.resolve().name}-{self.partition.order}{size}-shortlist{self.partition.shortlist}"
        return RESULTS / "runs" / settings.scale / "fold" / f"{name}-{self.tokens}tokens-{digest}"


def fold_run(teacher: Teacher, options: Options, folder: Path, command: str) -> dict[str, Any]:
    """Fold a run's head, distil its groups and leave a run folder; return its result row."""
    code_commit()  # read now, and remembered: the tree may change while the run goes on
    settings = dataclasses.replace(
        teacher.settings,
        experiment="fold",
        run_dir=str(folder),
        head=HeadSettings(
            name="grouped", tied=teacher.settings.head.tied, scorer="linear_sorted", partition=options.partition
        ),
    )
    order = token_order(settings.head, teacher.corpus.vocabulary_size, teacher.corpus.train.tokens)
    chosen, vocabulary_size = options.partition, teacher.corpus.vocabulary_size
    partition = equal_partition(vocabulary_size, chosen.group_size, order, chosen.shortlist).to(teacher.device)
    tagged = {"head": settings.head.name, "scorer": settings.head.scorer, "partition_order": chosen.order}
    record = RunRecord(folder, settings, 0, tagged | {"corpus": teacher.corpus.name}, job_type="fold")
    try:
        hidden, num_batches = teacher.start()
        folded = fold(teacher.head, partition, hidden, tied=settings.head.tied)
        at_once = final = teacher.evaluate(folded)
        record.log(0, with_perplexity(at_once))
        steps, tokens, last_kl = distil(teacher, folded, options, num_batches, record)
        if steps:
            final = teacher.evaluate(folded)
            record.log(steps, with_perplexity(final))
    except BaseException:
        record.fail()
        raise
    model = ModelWithHead(teacher.model.backbone, folded)
    final = with_perplexity(final)
    row = {
        "experiment": settings.experiment,
        "scale": settings.scale,
        "corpus": teacher.corpus.name,
        "seed": settings.seed,
        "model": settings.model.name,
        "hidden_size": settings.model.hidden_size,
        "num_layers": settings.model.num_layers,
        **describe_head(settings.head, folded),
        "learning_rate": options.learning_rate,
        "steps": steps,
        "tokens": tokens,
        "validation_loss_nats": final["validation_loss_nats"],
        "perplexity": final["perplexity"],
        "group_accuracy": final["validation_group_accuracy"],
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "distillation_tokens": options.tokens,
        "start_tokens": len(hidden),
        "teacher_loss_nats": teacher.validation_loss_nats,
        "teacher_perplexity": math.exp(teacher.validation_loss_nats),
        "at_once_loss_nats": at_once["validation_loss"],
        "at_once_perplexity": math.exp(at_once["validation_loss"]),
        "last_distillation_kl_nats": last_kl,
        "hardware": hardware(),
        "torch": torch_version(),
        "commit": code_commit(),
        "command": command,
    }
    save_weights(folder, model, {"vocabulary_size": str(teacher.corpus.vocabulary_size)})
    record.finish(row)
    return row


def with_perplexity(means: dict[str, float]) -> dict[str, float]:
    """An evaluation under the names of a training run's."""
    loss = means["validation_loss"]
    others = {name: value for name, value in means.items() if name != "validation_loss"}
    return {"validation_loss_nats": loss, "perplexity": math.exp(loss), **others}


def distil(
    teacher: Teacher, folded: FoldedHead, options: Options, first_batch: int, record: RunRecord
) -> tuple[int, int, float | None]:
    """Teach the group scorer on ``options.tokens`` tokens, from a batch of the training text on.

    Returns the steps, the tokens and the mean KL of the last batches, each taken before it was learned; None where
    there is no step. Raises UserError where the KL stops being finite.
    """
    rate = OptimizerSettings("adam", options.learning_rate, [0.9, 0.999], 0.0, None, "cosine", 0, 0.0)
    folded.scorer.requires_grad_(False)
    optimizer = build_optimizer(rate, folded)
    tokens_per_step = teacher.settings.batch_size * teacher.settings.sequence_length
    num_steps = math.ceil(options.tokens / tokens_per_step)
    tokens, last = 0, MeanLosses()
    for step in tqdm(range(num_steps), desc="distillation", mininterval=0.5 if sys.stderr.isatty() else 20.0):
        hidden, _ = teacher.hidden(*teacher.batches.batch(first_batch + step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(rate, step, step / num_steps)
        optimizer.zero_grad(set_to_none=True)
        loss = distillation_loss(folded, hidden, group_logits(teacher.head, folded.partition, hidden))
        loss.backward()
        optimizer.step()
        tokens += len(hidden)
        if not math.isfinite(loss.item()):
            raise UserError(f"the KL is {loss.item()} at step {step}: try a lower --learning-rate")
        record.log(step + 1, {"distillation_kl_nats": loss.item(), "tokens": tokens})
        if step >= (1 - LAST_SHARE) * num_steps:
            last.add(HeadLoss(loss.detach(), torch.tensor(len(hidden))))
    return num_steps, tokens, last.means(Ranks(), "")["loss"] if num_steps else None


def parse_arguments() -> Namespace:
    """The command line."""
    parser = ArgumentParser(prog="python -m vocabfold.fold", description=__doc__)
    parser.add_argument("run", type=Path, nargs="+", help="folder of a finished run with head=full")
    parser.add_argument("--order", nargs="+", default=["frequency"], choices=ORDERS, help=ORDER_HELP)
    parser.add_argument("--group-size", type=int, help="slots S (default: where groups plus slots are fewest)")
    parser.add_argument("--shortlist", type=int, nargs="+", default=[0], help="first tokens, a group each (default 0)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[TOKENS], help=TOKENS_HELP)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="Adam's (default %(default)s)")
    parser.add_argument("--run-dir", type=Path, help="where the folded run goes (default: results/runs/SCALE/fold/…)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args()


def all_options(arguments: Namespace, run: Path) -> list[Options]:
    """Every combination that the command line asks for, checked."""
    combinations = []
    for order, shortlist, tokens in itertools.product(arguments.order, arguments.shortlist, arguments.tokens):
        source = str(run) if order == "clustered" else None
        partition = PartitionSettings(order, arguments.group_size, shortlist, clustered_from=source)
        options = Options(partition, tokens, arguments.learning_rate)
        options.check()
        combinations.append(options)
    return combinations


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    arguments = parse_arguments()
    jobs = [(run, options) for run in arguments.run for options in all_options(arguments, run)]
    if arguments.run_dir is not None and len(jobs) > 1:
        raise UserError(f"--run-dir names one folder for {len(jobs)} foldings: leave it out")
    command = shlex.join(["python", "-m", "vocabfold.fold", *sys.argv[1:]])
    keep_freed_memory()
    teacher: Teacher | None = None
    for run, options in jobs:
        folder = arguments.run_dir or options.folder(run, load_settings(run))
        if (row := finished_row(folder)) is None:
            if teacher is None or teacher.folder != run:
                teacher = Teacher(run, arguments.device)
            row = fold_run(teacher, options, folder, command)
        print(
            f"{folder}: {row['partition_order']} order, {row['num_groups']} groups; validation perplexity: "
            f"teacher {row['teacher_perplexity']:.3f}, folded at once {row['at_once_perplexity']:.3f}, "
            f"after {row['tokens']:,} tokens {row['perplexity']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
