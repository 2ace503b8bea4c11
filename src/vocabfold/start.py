"""How a run begins: with fresh weights, or from a finished run, which the setting ``start`` names.

start=compress: the finished run with its input embedding compressed, trained on for a share of that run's tokens.
start=fold: its full softmax as a folded head. The backbone and the tokens' rows stay; the groups' scores are fitted in
closed form and then learn from the finished run's own group probabilities, on the text after that.

Either way train.py trains, evaluates and records what begins here like any other run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vocabfold.data.batches import Batches
from vocabfold.data.composing import Undrawn
from vocabfold.data.corpora import Corpus
from vocabfold.data.shapes import PictureBatches, Shapes
from vocabfold.embeddings.build import resolve_settings
from vocabfold.errors import UserError
from vocabfold.heads import FullHead, HeadLoss
from vocabfold.heads.fold import distillation_loss, fold, foldable, group_logits
from vocabfold.heads.folded import FoldedHead
from vocabfold.heads.settings import EXTRAS
from vocabfold.heads.vocabulary_order import wanted_partition
from vocabfold.models.build import ModelWithHead, build_model
from vocabfold.runs.load import load_run
from vocabfold.runs.record import finished_row
from vocabfold.runs.settings import BudgetSettings, Settings, load_settings
from vocabfold.runs.token_order import token_order
from vocabfold.tokens import IGNORE_INDEX, token_counts

FITTED_TOKENS = 4096  # whose hidden states fit the groups in closed form; the distillation begins after them
# What a run has in common with the finished run that it is made from.
BATCHES = ("sequence_length", "batch_size", "gradient_accumulation", "evaluation_batch_size")
COMMON = ("seed", "data", "development_share", "training_tokens", "model", *BATCHES, "precision")
INHERITED = {"fold": (*COMMON, "embedding"), "compress": (*COMMON, "head")}
GROUPS = {"size": "model"}  # groups of conf/ by the setting that they fill


@dataclass
class Beginning:
    """``model``: what is evaluated and kept. ``learner``: the module that turns a batch into the loss to descend, the
    model itself or one around it. ``first_batch``: of the training text. ``measured``: columns of the result row."""

    model: ModelWithHead
    learner: nn.Module
    first_batch: int = 0
    measured: dict[str, float] = field(default_factory=dict)


def adopt(settings: Settings, overrides: Sequence[str] = ()) -> Settings:
    """``settings`` with all that a run made from a finished one takes from it; those of any other run as they are.

    ``overrides``: the words of the command line, in which no inherited setting may be given another value. Raises
    UserError for that, and for a run that has not finished or cannot be begun from in this way.
    """
    kind = settings.start.type
    if kind == "none" or settings.start.run is None:
        return settings
    folder = Path(settings.start.run)
    finished, row = load_settings(folder), finished_row(folder)
    if row is None:
        raise UserError(f"{folder} has not finished: run its command again first")
    inherited = {name: getattr(finished, name) for name in INHERITED[kind]}
    _refuse_changes(settings, inherited, overrides)
    own = {"fold": _folded_settings, "compress": _compressed_settings}[kind](settings, finished, row)
    result = replace(settings, **inherited, **own)
    result.check()
    return result


def _refuse_changes(settings: Settings, inherited: dict[str, Any], overrides: Sequence[str]) -> None:
    named = {override.lstrip("+~").partition("=")[0].partition(".")[0] for override in overrides}
    for name in sorted({GROUPS.get(name, name) for name in named} & set(inherited)):
        if getattr(settings, name) != inherited[name]:
            raise UserError(f"start={settings.start.type} takes {name} from {settings.start.run}: leave it out")


def _folded_settings(settings: Settings, finished: Settings, row: dict[str, Any]) -> dict[str, Any]:
    head = settings.head
    if head.scorer != "linear_sorted" or head.group_scorer != "linear" or head.mixture:
        raise UserError("start=fold keeps the run's rows for the tokens: use head=linear_clustered")
    for name in EXTRAS:
        if getattr(head, name):
            raise UserError(f"start=fold learns from the run's own probabilities: leave head.{name} out")
    partition = head.partition
    if partition.symbols != 2:
        raise UserError("start=fold makes heads of two symbols a token: leave head.partition.symbols out")
    if partition.order == "clustered" and partition.clustered_from is None:
        partition = replace(partition, clustered_from=settings.start.run)
    head = replace(head, partition=partition, tied=finished.head.tied, count_biases=finished.head.count_biases)
    return {"head": head}


def _compressed_settings(settings: Settings, finished: Settings, row: dict[str, Any]) -> dict[str, Any]:
    table = load_run(Path(str(settings.start.run)), torch.device("cpu")).gpt.token_embedding.weight
    if finished.embedding.name != "dense" or not isinstance(table, Tensor):
        raise UserError(f"{settings.start.run} has no dense embedding: name a run that has")
    return {
        "embedding": resolve_settings(settings.embedding, table.detach()),
        "budget": BudgetSettings(tokens=round(settings.start.share * row["tokens"])),
        "optimizer": replace(finished.optimizer, learning_rate=settings.optimizer.learning_rate),
    }


def begin(
    settings: Settings, corpus: Corpus | Shapes, batches: Batches | PictureBatches, device: torch.device
) -> Beginning:
    """The model of a run before its first step, on ``device``. Raises UserError for impossible settings, and where the
    run to begin from does not fit."""
    begun = {"none": _fresh, "fold": _folded, "compress": _compressed}[settings.start.type](
        settings, corpus, batches, device
    )
    if settings.start.run is not None and (row := finished_row(Path(settings.start.run))) is not None:
        begun.measured["teacher_loss_nats"] = row["validation_loss_nats"]
    return begun


def _order(settings: Settings, corpus: Corpus | Shapes) -> Tensor | None:
    cache_dir = settings.data.get("cache_dir")
    return token_order(settings.head, corpus.vocabulary_size, corpus.targets, Path(cache_dir) if cache_dir else None)


def _fresh(settings: Settings, corpus: Corpus | Shapes, _: object, device: torch.device) -> Beginning:
    order = _order(settings, corpus)
    counts = token_counts(corpus.targets, corpus.vocabulary_size) if settings.head.count_biases else None
    built = build_model(settings.model, settings.head, corpus.vocabulary_size, order, settings.embedding, counts)
    model = built.to(device)
    return Beginning(model, model)


def _compressed(settings: Settings, corpus: Corpus | Shapes, _: object, device: torch.device) -> Beginning:
    begun = _fresh(settings, corpus, _, torch.device("cpu"))
    finished = load_run(Path(str(settings.start.run)), torch.device("cpu"))
    begun.measured["embedding_relative_error"] = begun.model.take_over(finished, settings.embedding)
    begun.model.to(device)
    return begun


def _folded(
    settings: Settings, corpus: Corpus | Shapes, batches: Batches | PictureBatches, device: torch.device
) -> Beginning:
    folder = Path(str(settings.start.run))
    teacher = load_run(folder, device).requires_grad_(False)
    head = foldable(teacher.head, folder)
    if corpus.vocabulary_size != head.vocabulary_size:
        raise UserError(f"{folder} was trained on other tokens than its config.yaml names: train it again")
    order = _order(settings, corpus)
    partition = wanted_partition(settings.head.partition, corpus.vocabulary_size, order).to(device)
    parts: list[Tensor] = []
    while sum(map(len, parts)) < FITTED_TOKENS:
        parts.append(hidden_states(teacher.backbone, *batches.batch(len(parts))))
    hidden = torch.cat(parts)[:FITTED_TOKENS]
    folded = fold(head, partition, hidden, tied=settings.head.tied)
    folded.scorer.requires_grad_(False)
    model = ModelWithHead(teacher.backbone, folded)
    return Beginning(model, Distillation(model, head), len(parts), {"start_tokens": len(hidden)})


class Distillation(nn.Module):
    """The groups of ``model``'s folded head learn from the exact group probabilities of ``teacher``, a full softmax on
    the same backbone, which stays as it is."""

    def __init__(self, model: ModelWithHead, teacher: FullHead) -> None:
        super().__init__()
        self.model, self.teacher = model, teacher

    def forward(self, inputs: Tensor, targets: Tensor, with_accuracy: bool = False) -> HeadLoss:
        """A batch as ModelWithHead takes it -> the mean KL in nats over the positions with a target."""
        folded = self.model.head
        assert isinstance(folded, FoldedHead)
        hidden = hidden_states(self.model.backbone, inputs, targets)
        loss = distillation_loss(folded, hidden, group_logits(self.teacher, folded.partition, hidden))
        return HeadLoss(loss, torch.tensor(len(hidden), device=hidden.device))


@torch.no_grad()
def hidden_states(backbone: nn.Module, inputs: Tensor | Undrawn, targets: Tensor) -> Tensor:
    """[N, D], without dropout, where there is something to predict in a batch."""
    hidden: Tensor = backbone.eval()(inputs.to(next(backbone.parameters()).device)).flatten(0, -2)
    return hidden[(targets.flatten() != IGNORE_INDEX).to(hidden.device)]
